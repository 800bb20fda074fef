"""Which column of a file stands for what, and what is said about the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from metarec.data.sources.assembly import Note
from metarec.data.sources.names import nearest, twice
from metarec.errors import DataError


@dataclass(frozen=True)
class Layout:
    """Which column of a file stands for what.

    Args:
        names: The file's columns.
        columns: Our name to the file's.
        guessed: Those of `columns` that nobody named: they were recognised by a usual name.
    """

    names: Sequence[str]
    columns: Mapping[str, str]
    guessed: Mapping[str, str]

    def notes(self, file: object, missing: Iterable[str]) -> list[Note]:
        """Says what was recognised, and which columns stand for nothing."""
        found = []
        if self.guessed:
            said = tuple(f"'{theirs}' as {ours}" for ours, theirs in self.guessed.items())
            cure = "Name others in 'columns' (--column OURS=THEIRS)"
            found.append(
                Note("guessed-column", "note", f"columns of {file} that were read by their usual names", cure, said)
            )
        unused = [name for name in dict.fromkeys(self.names) if name and name not in self.columns.values()]
        close = {name: nearest(name, missing) for name in unused}
        likely = tuple(f"'{name}' (did you mean '{ours}'?)" for name, ours in close.items() if ours)
        if likely:
            cure = "Rename them, or map them in 'columns' (--column OURS=THEIRS)"
            found.append(
                Note(
                    "misspelt-column", "warning", f"columns of {file} that look misspelt and are not read", cure, likely
                )
            )
        rest = tuple(f"'{name}'" for name, ours in close.items() if not ours)
        if rest:
            cure = (
                "Map those that describe items in 'columns' (--column OURS=THEIRS); name those that differ from row "
                "to row in 'context' or 'review' (--side context=NAME)"
            )
            found.append(Note("unused-column", "note", f"columns of {file} that nothing reads", cure, rest))
        return found


def theirs_to_ours(columns: Mapping[str, str], file: object) -> dict[str, str]:
    """Turns a mapping round; a column that stands for two things is an error."""
    for theirs, ours in twice(columns).items():
        raise DataError(
            f"column '{theirs}' of {file} is named for {' and '.join(ours)}", "Name one column for each in 'columns'"
        )
    return {theirs: ours for ours, theirs in columns.items()}
