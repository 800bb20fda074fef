"""The errors a user can cause, each naming the value, the place and the cure.

The command line turns any `MetarecError` into one line and exit status 2. It does not know about bugs: those
stay ordinary exceptions with their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class EvaluationError(MetarecError):
    """A score or a metric argument from which no honest number can be computed."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Names the closest known spelling.

    Args:
        name: What the user wrote.
        known: What would have been understood.

    Returns:
        A sentence such as ``Did you mean 'steps'?``, or a list of a few known names when nothing is close.
    """
    candidates = list(dict.fromkeys(known))
    folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(f"'{folded[match]}'" for match in close) + "?"
    listed = ", ".join(f"'{candidate}'" for candidate in candidates[:8])
    return f"Known: {listed}" + (", ..." if len(candidates) > 8 else "") if candidates else ""
