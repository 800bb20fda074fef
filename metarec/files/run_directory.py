"""Where a recommender lies in a directory that people name. Imports nothing heavy."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from metarec.files.artifacts import recover_dir

FACTS = "recommender.json"
# Where a run's directory keeps its recommender.
RUN_MODEL = "model"
# Where a run keeps a fine-tuned language model, beside the recommender that reads it.
TUNED_MODEL = "backbone"


# In a directory that names runs to serve: the file that does; see `metarec.serve.deployment`.
DEPLOYMENT = "deployment.json"


def recommender_dir(path: Path) -> Path | None:
    """Returns where a recommender lies: in a directory itself, or under `model` in the directory of a run.

    In the directory of a deployment it is that of the current run.
    """
    run = deployed_run(path)
    return next((part for part in (run, run / RUN_MODEL) if recover_dir(part) and (part / FACTS).exists()), None)


def deployed_run(path: Path) -> Path:
    """Returns the current run of a deployment's directory; any other path as it is."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Path(json.loads((path / DEPLOYMENT).read_text(encoding="utf-8"))["current"]["run"])
    return path


def tuned_model(path: Path, named: str) -> str:
    """Returns where a recommender's fine-tuned model is: as it is named, or beside it where both were moved.

    Args:
        path: The recommender's directory.
        named: The backbone that its settings name.
    """
    beside = path.parent / TUNED_MODEL
    moved = Path(named).name == TUNED_MODEL and not Path(named).exists() and beside.is_dir()
    return str(beside) if moved else named
