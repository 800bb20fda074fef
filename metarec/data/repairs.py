"""Mends what the checks found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from metarec.data.checks import CHECKS, malformed
from metarec.data.checks.findings import Checked, CheckLimits, DataFinding, Fault, counted, read_for_checks
from metarec.data.sources.assembly import Tables, first_filled
from metarec.data.text import plain_text
from metarec.errors import DataError

MOST_DROPPED = 0.05


def fix(
    data: Checked, findings: Sequence[DataFinding], limits: CheckLimits | None = None, *, force: bool = False
) -> tuple[Tables, list[str]]:
    """Mends what can be mended without guessing.

    Args:
        data: What was checked.
        findings: What to mend; those that are not fixable stay.
        limits: The limits that were checked with.
        force: Drop however many rows there are; otherwise at most `MOST_DROPPED` of the ratings and of the items go.

    Returns:
        The cleaned tables, and a sentence for everything that was done.

    Raises:
        DataError: The repairs would drop more than that.
    """
    limits = limits or CheckLimits()
    done: list[str] = []
    ratings, items = len(data.tables.ratings), len(data.tables.items)
    lost = 0
    for code in (finding.code for finding in findings if finding.fixable):
        if code == "malformed-row":
            done += [f"dropped {finding.count} rows: {finding.message}" for finding in malformed(data.tables)]
            lost = sum(finding.count for finding in malformed(data.tables))
        else:
            tables, said = _mended(data, code, limits)
            data, done = read_for_checks(tables, data.now), [*done, *said]
        gone = {
            "ratings": (lost + ratings - len(data.tables.ratings), lost + ratings),
            "items": (items - len(data.tables.items), items),
        }
        for what, (count, total) in gone.items():
            if count > MOST_DROPPED * total and not force:
                raise DataError(
                    f"--fix would drop {count:,} of {total:,} {what} ({count / total:.0%}) by '{code}' and what comes "
                    f"before it, more than {MOST_DROPPED:.0%}",
                    "Look at what 'metarec data check' finds and repair the source, or add --force",
                )
    return data.tables, done


def _mended(data: Checked, code: str, limits: CheckLimits) -> tuple[Tables, list[str]]:
    """Returns the tables after one repair, and what it did."""
    rule = CHECKS[code]
    fault = rule.find(data, limits)  # again: an earlier remedy may have settled it, or moved its rows
    if not fault.flags.any():
        return data.tables, []
    count, _, _ = counted(data, fault)
    if rule.remedy == "rewrite":
        texts = {
            name: [
                plain_text(text) if flag else text for text, flag in zip(data.catalog[name], fault.flags, strict=True)
            ]
            for name in data.catalog.columns.drop("item")
        }
        tables = replace(data.tables, items=data.catalog.assign(**texts))
        return tables, [f"rewrote {count} item texts: {rule.message}"]
    if fault.of == "items":
        kept = first_filled(data.catalog) if code == "duplicate-item-id" else data.catalog[~fault.flags]
        tables = replace(data.tables, items=kept.reset_index(drop=True))
        said = [f"dropped {count} items: {rule.message}"]
        gone = set(data.catalog["item"]) - set(kept["item"])
        fault = Fault(np.array([item in gone for item in data.items], bool)[data.item], "ratings")
        if not fault.flags.any():
            return tables, said
    else:
        tables, said = data.tables, []
    number = int(fault.flags.sum())
    left = tables.ratings[~fault.flags].reset_index(drop=True)
    tables = replace(tables, ratings=left, dropped={**tables.dropped, code: number})
    return tables, [*said, f"dropped {number} ratings: {rule.message}"]
