"""The commands of the service: ``serve | api-key``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import DeviceOption, JsonOption, show
from metarec.errors import ConfigError
from metarec.files.run_directory import DEPLOYMENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from metarec.serve.canary import Canary
    from metarec.serve.engine import Engine
    from metarec.serve.keys import ApiKey

app = typer.Typer()

_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "metarec.serve.guard.JsonLines"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}},
    "root": {"level": "WARNING", "handlers": ["out"]},
    "loggers": {"metarec": {"level": "INFO"}, "uvicorn": {"level": "INFO", "handlers": [], "propagate": True}},
}


@app.command(
    epilog="Example: metarec serve --checkpoint runs/mine --ui; a current run and a candidate, see metarec deploy: "
    "metarec serve --checkpoint live"
)
def serve(
    checkpoint: Annotated[Path, typer.Option(help="Directory of a run, of a saved recommender, or of a deployment.")],
    store: Annotated[
        str | None,
        typer.Option(help="Directory, or postgresql://... (default: CHECKPOINT/store).", show_default=False),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Directory of the adapters, with a PostgreSQL store.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address; any but loopback needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of the API keys to accept; made by 'metarec api-key'.", show_default=False)
    ] = None,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second for each key; 0 sets no limit.")] = 100.0,
    body: Annotated[int, typer.Option(min=1024, help="Bytes of a request's body at most.")] = 1 << 20,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait for the model.")] = 64,
    hot_megabytes: Annotated[int, typer.Option(min=0, help="Memory for adapters, in MiB.")] = 256,
    item_megabytes: Annotated[
        int, typer.Option(min=0, help="Memory for item gradients, which make the first step fast, in MiB.")
    ] = 256,
    device: DeviceOption = None,
    candidates: Annotated[int, typer.Option(min=32, help="Items scored exactly in a ranking.")] = 32,
    threads: Annotated[int, typer.Option(min=0, help="Batches of users adapted at once; 0: one per core.")] = 0,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve a page to try it on.")] = False,
    watch: Annotated[
        float, typer.Option(min=0, max=1, help="Share of users whose feedback the model is judged by.")
    ] = 1.0,
) -> None:
    """Serve recommendations over HTTP; every rating adapts its user's adapter. Logs go to standard output."""
    from metarec.cli.runs import check_run

    check_run(checkpoint, device)
    _check_extra()
    from metarec.serve.guard import RequestLimits

    limits = RequestLimits(_api_keys(api_key_file, host), rate, max(1, round(2 * rate)), body)
    from metarec.serve.app import create_app
    from metarec.serve.batching import use_one_thread_per_batch
    from metarec.serve.service import ServeSettings

    settings = ServeSettings(limits, waiting, ui=ui, watch=watch)
    sizes = {"hot_bytes": hot_megabytes << 20, "candidates": candidates, "linearized_bytes": item_megabytes << 20}
    place = store or str(checkpoint / "store")
    workers = use_one_thread_per_batch(threads)

    def open_app(run: Path) -> FastAPI:
        return create_app(_open_engine(run, place, adapters, device, workers, **sizes), settings)

    import logging.config

    import uvicorn

    from metarec.serve.slow_clients import PatientProtocol

    application = _deployed(checkpoint, open_app) if (checkpoint / DEPLOYMENT).is_file() else open_app(checkpoint)
    logging.config.dictConfig(_LOGGING)
    # Together with the time that the worker takes to finish, a stop stays within ten seconds.
    uvicorn.run(
        application,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        http=PatientProtocol,
        timeout_graceful_shutdown=5,
        server_header=False,
    )


def _deployed(folder: Path, open_app: Callable[[Path], FastAPI]) -> Canary:
    from metarec.serve.canary import Canary

    return Canary(folder, open_app)


def _check_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serving needs '{error.name}'", "Run: pip install 'metarec[serve]'") from None
    _ = fastapi, prometheus_client, uvicorn


def _api_keys(path: Path | None, host: str) -> Callable[[], tuple[ApiKey, ...]]:
    """Opens the key file; without one, the host must be this machine's own."""
    from metarec.serve.guard import is_loopback
    from metarec.serve.keys import KeyFile

    if path is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached by others",
            "Give --api-key-file (see: metarec api-key), or leave it out",
        )
    return KeyFile(path) if path else tuple


def _open_engine(
    checkpoint: Path, store: str, adapters: Path | None, device: str | None, workers: int, **sizes: int
) -> Engine:
    """Opens a recommender and its store, ready to rank; `sizes` are the engine's."""
    from metarec.cli.runs import load_run
    from metarec.serve.engine import Engine
    from metarec.serve.store import AdapterStore
    from metarec.serve.warm import warm_folder

    recommender = load_run(checkpoint, device=device)
    opened = AdapterStore(store, adapters)
    opened.gc()
    engine = Engine(recommender, opened, workers=workers, warm=warm_folder(checkpoint), **sizes)
    engine.prepare()
    return engine


@app.command("api-key", epilog="Example: metarec api-key keys.txt --name shop")
def api_key(
    file: Annotated[Path, typer.Argument(help="Key file to add to; it keeps a hash, not the key.")],
    name: Annotated[str, typer.Option(help="Whose key it is; it appears in the log.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, write, erase or admin; may be repeated (default: all).", show_default=False),
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0, max=36500, help="Days until it expires (default: never).", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make an API key, print it once, and add its hash to a key file; a server that runs takes it within a second."""
    from metarec.serve.keys import SCOPES, add_key, new_key

    secret, key = new_key(name, scope or SCOPES, days)
    add_key(file, key)
    show({"name": name, "key": secret, "file": str(file)}, json)
