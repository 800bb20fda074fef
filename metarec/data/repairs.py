"""Mends what the checks found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from metarec.data.checks import CHECKS, malformed
from metarec.data.checks.findings import Checked, CheckLimits, DataFinding, counted, read_for_checks
from metarec.data.sources.assembly import Tables
from metarec.data.text import plain_text


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
