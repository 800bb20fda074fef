"""Where a recommender lies in a directory that people name. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from metarec.artifacts import recover_dir

FACTS = "recommender.json"
# Where a run's directory keeps its recommender.
RUN_MODEL = "model"


def recommender_dir(path: Path) -> Path | None:
    """Returns where a recommender lies: in a directory itself, or under `model` in the directory of a run."""
    return next((part for part in (path, path / RUN_MODEL) if recover_dir(part) and (part / FACTS).exists()), None)
