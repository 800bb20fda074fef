"""The errors a user can cause, each naming the value, the place and the cure.

The command line turns any `MetarecError` into one line and exit status 2. It does not know about bugs: those
stay ordinary exceptions with their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CLOSE = 0.7
_SHOWN = 80


class MetarecError(ValueError):
    """Base of every error that a user's input or environment can cause.

    Args:
        problem: What was found, naming the value and the place.
        cure: What to do about it.
    """

    def __init__(self, problem: str, cure: str = "") -> None:
        self.problem = problem
        self.cure = cure
        super().__init__(f"{problem}. {cure}" if cure else problem)


class DataError(MetarecError):
    """A dataset, a column or a row is not what its format promises."""


class RatingError(DataError):
    """A rating is not a finite number on the task's scale, or contradicts another one."""


class UnknownItemError(DataError):
    """An item is named that the catalog does not hold."""


class ConfigError(MetarecError):
    """A configuration key or value is not understood."""


class BackboneError(MetarecError):
    """A language model cannot be found, loaded or used the way that was asked."""


class ArtifactError(MetarecError):
    """A checkpoint or adapter on disk is missing, truncated, altered or of another schema."""


class StoreError(MetarecError):
    """A store of adapters and feedback cannot be opened, read or written."""


class ConflictError(StoreError):
    """What is asked contradicts what the store already holds."""


class TrainingError(MetarecError):
    """A training from which nothing useful can come."""


class RankError(TrainingError):
    """Another process of a training that several share failed, and said why."""


class EvaluationError(MetarecError):
    """A score or a metric argument from which no honest number can be computed."""


def shown(value: object) -> str:
    """Returns a value as Python writes it, cut to the length that a one-line message has room for."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """Names the closest known spelling.

    Args:
        name: What the user wrote.
        known: What would have been understood.

    Returns:
        A sentence such as ``Did you mean 'steps'?``, or a list of a few known names when nothing is close.
    """
    candidates = list(dict.fromkeys(known))
    likeness = {candidate: _likeness(name.casefold(), candidate.casefold()) for candidate in candidates}
    best = max(likeness.values(), default=0.0)
    if best >= _CLOSE:
        close = [candidate for candidate in candidates if likeness[candidate] > best - 0.05][:3]
        return "Did you mean " + " or ".join(f"'{candidate}'" for candidate in close) + "?"
    listed = ", ".join(f"'{candidate}'" for candidate in candidates[:8])
    return f"Known: {listed}" + (", ..." if len(candidates) > 8 else "") if candidates else ""


def _likeness(name: str, known: str) -> float:
    """Compares with the whole and, a little less, with as long a start: people leave ends out."""
    matcher = difflib.SequenceMatcher(None, b=name, autojunk=False)
    matcher.set_seq1(known)
    whole = matcher.ratio()
    matcher.set_seq1(known[: len(name) + 1])
    return max(whole, 0.95 * matcher.ratio())
