"""Mends what the checks found, and describes a dataset."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from metarec.artifacts import SCHEMA_VERSION
from metarec.data.checks import (
    CHECKS,
    CODES,
    SHOWN,
    Checked,
    CheckLimits,
    DataFinding,
    counted,
    malformed,
    plain_text,
    read_for_checks,
)
from metarec.data.interactions import Catalog, Flags
from metarec.data.sources.assembly import Tables
from metarec.errors import ConfigError, suggest


def near_duplicates(catalog: Catalog, seen: Flags) -> DataFinding | None:
    """Finds unseen items whose text nearly is that of a seen one, across an item-cold split.

    Similarity is the cosine of character 3- to 5-gram counts of the titles, weighted by rarity; at .9 two titles are
    the same to a reader. Where both have a year, the years are the same too: a remake is another item.

    Args:
        catalog: The items.
        seen: Items that meta-training may see, shape (items,).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    titles = [" ".join(re.sub(r"[^\w\s]", " ", title.casefold()).split()) for title in catalog.fields["title"]]
    cold, warm = np.flatnonzero(~seen), np.flatnonzero(seen)
    texts = [title or f"\0{code}" for code, title in enumerate(titles)]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), token_pattern=None).fit_transform(texts)
    years = catalog.fields.get("year", ("",) * len(catalog))
    pairs = []
    for block in np.array_split(cold, max(1, len(cold) // 500)):
        likeness = (vectors[block] @ vectors[warm].T).tocoo()
        close = likeness.data >= 0.9
        for row, column in zip(likeness.row[close], likeness.col[close], strict=True):
            one, two = int(block[row]), int(warm[column])
            if not years[one] or not years[two] or years[one] == years[two]:
                pairs.append((one, two))
    if not pairs:
        return None
    shown = tuple(
        f"{catalog.ids[one]} '{catalog.title(one)[:60]}' ~ {catalog.ids[two]} '{catalog.title(two)[:60]}'"
        for one, two in pairs[:SHOWN]
    )
    return DataFinding(
        "near-duplicate-item", "warning", len({one for one, _ in pairs}), "items", len(cold),
        "unseen items that nearly repeat a seen one, across the item-cold split",
        "Merge them, or read item-cold results as an upper bound", shown, False,
    )  # fmt: skip


def leakage(leaks: Sequence[str]) -> DataFinding | None:
    """Puts what `TaskData.leaks` says into a finding."""
    if not leaks:
        return None
    return DataFinding(
        "leak",
        "error",
        len(leaks),
        "ways",
        len(leaks),
        "training can see what is tested",
        "Report this as a bug: a split must not leak",
        tuple(leaks),
        False,
    )


def fix(data: Checked, findings: Sequence[DataFinding], limits: CheckLimits | None = None) -> tuple[Tables, list[str]]:
    """Mends what can be mended without guessing.

    Args:
        data: What was checked.
        findings: What to mend; those that are not fixable stay.
        limits: The limits that were checked with.

    Returns:
        The cleaned tables, and a sentence for everything that was done.
    """
    limits = limits or CheckLimits()
    done: list[str] = []
    for code in (finding.code for finding in findings if finding.fixable):
        if code == "malformed-row":
            done += [f"dropped {finding.count} rows: {finding.message}" for finding in malformed(data.tables)]
            continue
        rule = CHECKS[code]
        fault = rule.find(data, limits)  # again: an earlier remedy may have settled it, or moved its rows
        if not fault.flags.any():
            continue
        count, _, _ = counted(data, fault)
        if rule.remedy == "rewrite":
            texts = {
                name: [
                    plain_text(text) if flag else text
                    for text, flag in zip(data.catalog[name], fault.flags, strict=True)
                ]
                for name in data.catalog.columns.drop("item")
            }
            tables = replace(data.tables, items=data.catalog.assign(**texts))
            done.append(f"rewrote {count} item texts: {rule.message}")
        elif fault.of == "items":
            tables = replace(data.tables, items=data.catalog[~fault.flags].reset_index(drop=True))
            done.append(f"dropped {count} items: {rule.message}")
        else:
            kept = data.tables.ratings[~fault.flags].reset_index(drop=True)
            dropped = {**data.tables.dropped, code: int(fault.flags.sum())}
            tables = replace(data.tables, ratings=kept, dropped=dropped)
            done.append(f"dropped {int(fault.flags.sum())} ratings: {rule.message}")
        data = read_for_checks(tables, data.now)
    return data.tables, done


def read_threshold(text: str) -> tuple[str, float, bool]:
    """Reads ``CODE=LIMIT``: a number of rows (``markup=10``), or a share (``thin-user=5%``).

    Returns:
        The finding's code, the limit, and whether it is a share.

    Raises:
        ConfigError: The code is unknown, or the limit is no number.
    """
    code, equals, limit = text.partition("=")
    if code not in CODES and code not in ("error", "warning", "note"):
        raise ConfigError(f"--fail-on {text!r} names no finding", suggest(code, [*CODES, "error", "warning", "note"]))
    share = limit.endswith("%")
    number = limit.removesuffix("%") if equals else "0"
    if not re.fullmatch(r"\d+(\.\d+)?", number):
        raise ConfigError(f"--fail-on {text!r} has no limit", "Write e.g. markup=10 or thin-user=5%")
    return code, float(number) / (100 if share else 1), share


def broken(findings: Sequence[DataFinding], thresholds: Sequence[tuple[str, float, bool]]) -> list[str]:
    """Says which thresholds are broken: a finding beyond its limit, by code or by severity."""
    said = []
    for code, limit, share in thresholds:
        for finding in findings:
            value = finding.share if share else finding.count
            if code in (finding.code, finding.severity) and value > limit:
                shown = (f"{value:.2%}", f"{limit:.2%}") if share else (f"{finding.count}", f"{limit:g}")
                said.append(f"{finding.code}: {shown[0]}, more than {shown[1]}")
    return said


def describe(data: Checked) -> dict[str, Any]:
    """Returns what a dataset is: sizes, density, spread, rating histogram, time span, and how full its fields are."""
    by_user = np.bincount(data.user, minlength=len(data.users))
    by_item = np.bincount(data.item, minlength=len(data.items))
    finite = data.rating[np.isfinite(data.rating)]
    values, counts = np.unique(finite, return_counts=True)
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "where": data.tables.where,
        "ratings": len(data.user),
        "users": int((by_user > 0).sum()),
        "items": len(data.catalog),
        "items_rated": int((by_item > 0).sum()),
        "density": float(len(data.user) / max((by_user > 0).sum() * max(len(data.catalog), 1), 1)),
        "ratings_per_user": _spread(by_user[by_user > 0]),
        "ratings_per_item": _spread(by_item[by_item > 0]),
        "mean_rating": float(finite.mean()) if len(finite) else None,
        "histogram": {f"{value:g}": int(count) for value, count in zip(values[:50], counts[:50], strict=True)},
        "fields": {
            str(name): {
                "filled": float((data.catalog[name].str.strip() != "").mean()) if len(data.catalog) else 0.0,
                "distinct": int(data.catalog[name].nunique()),
                "longest": int(data.catalog[name].str.len().max()) if len(data.catalog) else 0,
            }
            for name in data.catalog.columns
        },
        "dropped": dict(data.tables.dropped),
    }
    if data.time is not None and np.isfinite(data.time).any():
        ends = (float(np.nanmin(data.time)), float(np.nanmax(data.time)))
        facts["first"], facts["last"] = (_date(end) for end in ends)
    return facts


def _spread(counts: np.ndarray) -> dict[str, float]:
    if not len(counts):
        return {}
    named = zip(
        ("least", "quarter", "median", "three quarters", "most"),
        np.percentile(counts, [0, 25, 50, 75, 100]),
        strict=True,
    )
    return {name: float(value) for name, value in named}


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s"


def to_json(
    findings: Sequence[DataFinding],
    done: Sequence[str] = (),
    verdict: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns findings as plain JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        **(facts or {}),
        "findings": [{**vars(finding), "rows": list(finding.rows), "share": finding.share} for finding in findings],
        "fixed": list(done),
        "broken_thresholds": list(verdict),
    }
