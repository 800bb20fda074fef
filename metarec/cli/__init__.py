"""The command line: verbs of a run (`runs`, `quickstart`), of tasks and data, of the service and its store.

Results go to standard output (with ``--json`` as JSON alone), progress and errors to standard error. A user's mistake
ends with one line and status 2, Ctrl-C with status 130 and a checkpoint. Heavy imports happen inside the commands, so
that ``--help`` answers at once. Knows nothing that the Python API does not.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from metarec.cli import (
    bench,
    data,
    deploy,
    ensemble,
    features,
    finetune,
    hub,
    quickstart,
    runs,
    search,
    serve,
    shrink,
    store,
    tasks,
    tune,
)
from metarec.errors import ConfigError, MetarecError, RankError

app = typer.Typer(
    name="metarec",
    help="Meta-learning few-shot recommendation: adapt a language model to a new user in a few gradient steps.",
    epilog="Example: metarec train --name mine && metarec evaluate runs/mine",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(runs.app)
app.add_typer(finetune.app)
app.add_typer(ensemble.app)
app.add_typer(tune.app)
app.add_typer(shrink.app)
app.add_typer(search.app)
app.add_typer(quickstart.app)
app.add_typer(bench.app)
app.add_typer(tasks.tasks_app, name="tasks")
app.add_typer(data.data_app, name="data")
app.add_typer(features.features_app, name="features")
app.add_typer(serve.app)
app.add_typer(store.app)
app.add_typer(deploy.deploy_app, name="deploy")
app.add_typer(hub.app)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    include_path: Annotated[
        list[Path] | None,
        typer.Option("--include-path", help="Folder of your own tasks, FAMILY/NAME.yaml.", show_default=False),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="module:attribute that a saved run may name; may be repeated.", show_default=False),
    ] = None,
) -> None:
    _refuse_several_processes(context.invoked_subcommand)
    for name in plugin or []:
        from metarec.registry import allow

        allow(name)
    if include_path:
        # Where every verb looks, whatever it calls: METAREC_TASKS is how tasks are found.
        known = os.environ.get("METAREC_TASKS")
        os.environ["METAREC_TASKS"] = os.pathsep.join([*([known] if known else []), *map(str, include_path)])
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("metarec"))
        raise typer.Exit


def _refuse_several_processes(verb: str | None) -> None:
    """Refuses a verb that torchrun started more than once: each process would do and write all of it."""
    if verb in (None, "train") or "WORLD_SIZE" not in os.environ:
        return
    from metarec.meta.distributed import started_together

    if (count := started_together()) > 1:
        raise ConfigError(f"'metarec {verb}' is for one process, and {count} were started", "Start it without torchrun")


def main() -> None:
    """Entry point of the ``metarec`` command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app(standalone_mode=True)
    except MetarecError as error:
        # Of the processes on a machine that another one's error ends, the first says so.
        if not isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0":
            typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
