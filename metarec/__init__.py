"""metarec: meta-learning few-shot recommendation.

Importing the package is instant; torch and transformers load with the first name that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metarec.errors import MetarecError

if TYPE_CHECKING:
    __version__: str
    from metarec.adapted_user import AdaptedUser, Recommendation
    from metarec.config import RunConfig
    from metarec.data.task import Task
    from metarec.data.task_files import load_task
    from metarec.evaluation.report import Report
    from metarec.presets import preset
    from metarec.recommender import MetaRecommender

_HOMES = {
    "AdaptedUser": "metarec.adapted_user",
    "MetaRecommender": "metarec.recommender",
    "Recommendation": "metarec.adapted_user",
    "Report": "metarec.evaluation.report",
    "RunConfig": "metarec.config",
    "Task": "metarec.data.task",
    "load_task": "metarec.data.task_files",
    "preset": "metarec.presets",
}

__all__ = [
    "AdaptedUser",
    "MetaRecommender",
    "MetarecError",
    "Recommendation",
    "Report",
    "RunConfig",
    "Task",
    "__version__",
    "load_task",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("metarec")
    if name not in _HOMES:
        raise AttributeError(f"module 'metarec' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
