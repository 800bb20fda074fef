"""The commands of a deployment: ``deploy create | task | start | status | promote | rollback``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import JsonOption, print_json, show
from metarec.errors import ConfigError

if TYPE_CHECKING:
    from metarec.serve.deployment import Comparison, Deployment
    from metarec.serve.prequential import Sums

deploy_app = typer.Typer(
    help="Serve a new run to some users first, then to all or to none: metarec serve --checkpoint DIR follows.",
    no_args_is_help=True,
)

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the deployment.")]
RunOption = Annotated[Path, typer.Option("--run", help="Directory of a run.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Store of the service, or postgresql://... (default: DIR/store).", show_default=False),
]
MarginOption = Annotated[float, typer.Option(min=0, help="How much lower the candidate's AUC may be.")]


@deploy_app.command(epilog="Example: metarec deploy create live --run runs/old && metarec serve --checkpoint live")
def create(folder: FolderArgument, run: RunOption, json: JsonOption = False) -> None:
    """Make a deployment that serves one run to all users."""
    from metarec.serve.deployment import DeployedRun, create_deployment

    _show(folder, create_deployment(folder, DeployedRun.of(run)), json)


@deploy_app.command(epilog="Example: metarec deploy task live --out again.yaml && metarec train again.yaml --from live")
def task(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option(help="Where to write the task.")],
    store: StoreOption = None,
) -> None:
    """Write the task of the current run over what its service has collected, to train on."""
    import yaml

    from metarec.files.artifacts import load_json, replace_file
    from metarec.files.run_directory import FACTS, recommender_dir
    from metarec.serve.deployment import read_deployment
    from metarec.serve.index import is_remote

    current = Path(read_deployment(folder).current.run)
    if store is not None and is_remote(store):
        raise ConfigError("a PostgreSQL store is not read as a data set", "Export it, or train where a copy is")
    found = recommender_dir(current)
    assert found is not None
    facts = load_json(found / FACTS)["task"]
    collected = Path(store) if store is not None else folder / "store"
    source = {"source": "store", "path": str(collected.absolute()), "options": {"items": str(current)}}
    text = yaml.safe_dump({**facts, "dataset": source}, sort_keys=False, allow_unicode=True)
    replace_file(out, lambda target: target.write_text(text, encoding="utf-8"))
    typer.echo(f"train on it: metarec train {out} --from {folder} --name NAME")


@deploy_app.command(epilog="Example: metarec deploy start live --run runs/new --share 0.1")
def start(
    folder: FolderArgument,
    run: RunOption,
    share: Annotated[float, typer.Option(help="Share of the users that the candidate serves.")] = 0.1,
    json: JsonOption = False,
) -> None:
    """Serve a candidate to a share of the users; a server that runs loads it and follows within seconds."""
    from metarec.serve.deployment import DeployedRun, change_deployment, read_deployment, refuse_unlike

    candidate = DeployedRun.of(run)
    missing = refuse_unlike(read_deployment(folder).current, candidate)
    if missing:
        typer.echo(f"warning: '{run}' does not know {missing} of the current run's items", err=True)
    _show(folder, change_deployment(folder, lambda before: before.started(candidate, share)), json)


@deploy_app.command(epilog="Example: metarec deploy status live")
def status(
    folder: FolderArgument, store: StoreOption = None, margin: MarginOption = 0.01, json: JsonOption = False
) -> None:
    """Compare the candidate with the current run by the ratings of their users since the canary began."""
    from metarec.serve.deployment import read_deployment

    deployment = read_deployment(folder)
    if deployment.candidate is None:
        _show(folder, deployment, json)
        return
    sums, comparison = _compared(folder, deployment, store, margin)
    if json:
        models = {role: found.values() for role, found in sums.items()}
        print_json({"deployment": asdict(deployment), "models": models, "comparison": asdict(comparison)})
        return
    _print(deployment, sums, comparison)


@deploy_app.command(epilog="Example: metarec deploy promote live")
def promote(
    folder: FolderArgument,
    store: StoreOption = None,
    margin: MarginOption = 0.01,
    anyway: Annotated[bool, typer.Option("--anyway", help="Whatever the comparison says.")] = False,
    json: JsonOption = False,
) -> None:
    """Serve the candidate to all users, if the comparison finds it better or not worse."""
    from metarec.serve.deployment import change_deployment, read_deployment

    deployment = read_deployment(folder)
    deployment.promoted()  # raises where there is no candidate
    if not anyway:
        sums, comparison = _compared(folder, deployment, store, margin)
        if not json:
            _print(deployment, sums, comparison)
        if comparison.verdict not in ("better", "not worse"):
            raise ConfigError(
                f"the candidate is not promoted, it is {comparison.verdict}: {comparison.because}",
                "Wait for more feedback, roll it back, or add --anyway",
            )

    def change(now: Deployment) -> Deployment:
        if now != deployment:
            raise ConfigError("another process changed the deployment meanwhile", "Look at: metarec deploy status")
        return now.promoted()

    _show(folder, change_deployment(folder, change), json)


@deploy_app.command(epilog="Example: metarec deploy rollback live")
def rollback(folder: FolderArgument, json: JsonOption = False) -> None:
    """End the canary; without one, serve what was current before the last promotion."""
    from metarec.serve.deployment import Deployment, change_deployment

    _show(folder, change_deployment(folder, Deployment.rolled_back), json)


def _compared(
    folder: Path, deployment: Deployment, store: str | None, margin: float
) -> tuple[dict[str, Sums], Comparison]:
    """Returns the sums of both models in a store, and what follows from them."""
    from contextlib import closing

    from metarec.serve.deployment import compare, sums_of
    from metarec.serve.index import INDEX_FILE, Index, is_remote

    place = store or str(folder / "store")
    if not is_remote(place) and not (Path(place) / INDEX_FILE).exists():
        raise ConfigError(f"'{place}' holds no store", "Give the service's with --store")
    with closing(Index(place)) as index:
        sums = sums_of(index.fact, deployment)
    return sums, compare(sums["current"], sums["candidate"], margin)


def _show(folder: Path, deployment: Deployment, json: bool) -> None:
    if json:
        print_json({"deployment": asdict(deployment)})
        return
    facts: dict[str, Any] = {"deployment": folder, "current": deployment.current.run}
    if deployment.candidate is not None:
        facts |= {"candidate": deployment.candidate.run, "share": deployment.share}
    if deployment.previous is not None:
        facts |= {"previous": deployment.previous.run}
    show({**facts, "changed": deployment.changed}, json)


def _print(deployment: Deployment, sums: dict[str, Sums], comparison: Comparison) -> None:
    assert deployment.candidate is not None
    runs = {"current": deployment.current.run, "candidate": deployment.candidate.run}
    typer.echo(f"canary of {deployment.share:g} of the users since {deployment.changed}")
    heads = f"{'':10s} {'ratings':>8s} {'pairs':>8s} {'AUC':>7s} {'log-loss':>9s} {'calibration':>12s}"
    typer.echo(f"{heads} {'diverged':>9s}  run")
    for role, found in sums.items():
        values = [
            "-" if value is None else f"{value:.4f}"
            for value in (found.auc, found.log_loss, found.calibration_error, found.diverged)
        ]
        counts = f"{role:10s} {found.came:8d} {found.pairs:8d}"
        typer.echo(f"{counts} {values[0]:>7s} {values[1]:>9s} {values[2]:>12s} {values[3]:>9s}  {runs[role]}")
    for what, row in (("AUC", comparison.auc), ("log-loss", comparison.log_loss)):
        if row is not None:
            typer.echo(f"{what} of the candidate: {row[0]:+.4f} [{row[1]:+.4f} {row[2]:+.4f}]")
    typer.echo(f"verdict: {comparison.verdict}: {comparison.because}")
