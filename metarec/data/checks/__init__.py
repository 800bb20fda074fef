"""Says what is wrong with a dataset, row by row.

Every check is one function from raw tables to findings; a finding names its rows and its cure, and says whether
`metarec.data.repairs.fix` can mend it. Knows nothing of models; of tasks only what a caller passes in.
"""

from __future__ import annotations

from metarec.data.checks.findings import SHOWN, Checked, CheckLimits, DataFinding, counted
from metarec.data.checks.items import ITEM_CHECKS
from metarec.data.checks.ratings import RATING_CHECKS
from metarec.data.checks.side import CODES as SIDE_CODES
from metarec.data.sources.assembly import Note, Tables

CHECKS = {**RATING_CHECKS, **ITEM_CHECKS}
NOTES = (
    "guessed-column",
    "misspelt-column",
    "unused-column",
    "item-field",
    "empty-cell",
    "no-item-column",
    "no-rating-column",
    "several-titles",
    "some-timed",
)
CODES = ("malformed-row", *NOTES, *CHECKS, *SIDE_CODES, "near-duplicate-item", "leak", "long-prompt")


def check(data: Checked, limits: CheckLimits | None = None) -> list[DataFinding]:
    """Runs every check; findings come in the order of `CHECKS`."""
    limits = limits or CheckLimits()
    found = [*map(noted, data.tables.notes), *malformed(data.tables)]
    for code, rule in CHECKS.items():
        fault = rule.find(data, limits)
        if not fault.flags.any():
            continue
        count, total, rows = counted(data, fault)
        found.append(
            DataFinding(
                code, rule.severity, count, fault.of, total, rule.message, rule.cure, rows, rule.remedy is not None
            )
        )
    return found


def noted(note: Note) -> DataFinding:
    """Puts what a source said about its columns into a finding."""
    count = max(len(note.names), 1)
    return DataFinding(
        note.code, note.severity, count, note.of, count, note.message, note.cure, note.names[:SHOWN], False
    )


def malformed(tables: Tables) -> list[DataFinding]:
    """Rows that the source set aside because they are no rows of their table at all."""
    rows = [
        f"{number}{side}"
        for frame, side in ((tables.ratings, ""), (tables.items, " (items)"))
        for number in frame.attrs.get("malformed", ())
    ]
    total = len(tables.ratings) + len(tables.items) + len(rows)
    message, cure = "rows with the wrong number of fields, or lines that are no objects", "Repair or drop them"
    found = DataFinding("malformed-row", "error", len(rows), "rows", total, message, cure, tuple(rows[:SHOWN]), True)
    return [found] if rows else []
