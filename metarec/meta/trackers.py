"""The trackers that metarec knows; each imports its package when a run begins. See `metarec.meta.tracking.Tracker`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from metarec.meta.tracking import PROJECT, TrackedRun

# MLflow takes shorter values alone.
_MOST_CHARACTERS = 500


class TensorBoard:
    """Writes event files into the run's directory: ``tensorboard --logdir runs`` shows all runs.

    Args:
        run: The run.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; what an earlier training wrote of this step and later ones gives way."""
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self._run.folder / "tensorboard"), purge_step=step)
        rows = "".join(f"| {key} | {value} |\n" for key, value in self._run.settings.items())
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", step)
        return writer

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """Sends a run to the experiment ``metarec`` of the server, or folder, that MLFLOW_TRACKING_URI names.

    Args:
        run: The run.
    """

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client: Any = MlflowClient()
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(PROJECT)
        self._run = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:_MOST_CHARACTERS]) for key, value in run.settings.items()]
        self._client.log_batch(self._run, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


class Trackio:
    """Writes a run to the project ``metarec`` of trackio, on this machine unless its own settings say otherwise.

    Args:
        run: The run.
    """

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        settings = {key: str(value) for key, value in run.settings.items()}
        with contextlib.redirect_stdout(sys.stderr):  # standard output is the command's result
            self._run: Any = trackio.init(project=PROJECT, name=run.name, config=settings, resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
