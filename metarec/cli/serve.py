"""The verbs of the service: ``serve | api-key``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metarec.cli.options import JsonOption, show
from metarec.errors import ConfigError

app = typer.Typer()

_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "metarec.serve.guard.JsonLines"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}},
    "root": {"level": "WARNING", "handlers": ["out"]},
    "loggers": {"metarec": {"level": "INFO"}, "uvicorn": {"level": "INFO", "handlers": [], "propagate": True}},
}


@app.command(epilog="Example: metarec serve --checkpoint runs/mine --ui")
def serve(
    checkpoint: Annotated[Path, typer.Option(help="Directory of a run, or of a saved recommender.")],
    store: Annotated[
        str | None,
        typer.Option(help="Directory, or postgresql://... (default: CHECKPOINT/store).", show_default=False),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Where adapters lie, with a PostgreSQL store.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address; any but loopback needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Who may ask; made by 'metarec api-key'.", show_default=False)
    ] = None,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second for each key; 0 is any number.")] = 100.0,
    body: Annotated[int, typer.Option(min=1024, help="Bytes of a request's body at most.")] = 1 << 20,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait for the model.")] = 64,
    hot_megabytes: Annotated[int, typer.Option(min=0, help="Memory for adapters, in MiB.")] = 256,
    item_megabytes: Annotated[
        int, typer.Option(min=0, help="Memory for what makes the first step fast, in MiB, read at the start.")
    ] = 256,
    candidates: Annotated[int, typer.Option(min=32, help="Items scored exactly in a ranking.")] = 32,
    threads: Annotated[int, typer.Option(min=0, help="Batches of users adapted side by side; 0: one per core.")] = 0,
    ui: Annotated[bool, typer.Option("--ui", help="Serve a page to try it on.")] = False,
) -> None:
    """Serve recommendations over HTTP: users rate, adapters learn, rankings follow. Logs go to standard output."""
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serving needs '{error.name}'", "Run: pip install 'metarec[serve]'") from None
    from metarec.serve.guard import RequestLimits, is_loopback, read_keys

    _ = fastapi, prometheus_client
    if api_key_file is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached by others",
            "Give --api-key-file (see: metarec api-key), or leave it out",
        )
    keys = read_keys(api_key_file) if api_key_file else ()
    import logging.config

    from metarec.cli.runs import load_run
    from metarec.serve.app import create_app
    from metarec.serve.engine import Engine, side_by_side
    from metarec.serve.service import ServeSettings
    from metarec.serve.store import AdapterStore

    workers = side_by_side(threads)
    recommender = load_run(checkpoint)
    opened = AdapterStore(store or checkpoint / "store", adapters)
    opened.gc()
    engine = Engine(
        recommender,
        opened,
        hot_bytes=hot_megabytes << 20,
        candidates=candidates,
        workers=workers,
        tangent_bytes=item_megabytes << 20,
    )
    engine.prepare()
    limits = RequestLimits(keys, rate, max(1, round(2 * rate)), body)
    application = create_app(engine, ServeSettings(limits, waiting, ui=ui))
    logging.config.dictConfig(_LOGGING)
    # Together with what the worker takes to finish, a stop stays within ten seconds.
    uvicorn.run(
        application,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
    )


@app.command("api-key", epilog="Example: metarec api-key keys.txt --name shop")
def api_key(
    file: Annotated[Path, typer.Argument(help="Key file to add to; it keeps a hash, not the key.")],
    name: Annotated[str, typer.Option(help="Whose key it is; it stands in the log.")],
    json: JsonOption = False,
) -> None:
    """Make an API key, print it once, and add its hash to a key file."""
    from metarec.artifacts import replace_file
    from metarec.serve.guard import new_key, read_keys

    known = read_keys(file) if file.exists() else ()
    if any(key.name == name for key in known):
        raise ConfigError(f"'{file}' has a key named '{name}'", "Choose another name, or remove its line")
    secret, key = new_key(name)
    lines = "".join(f"{entry.name} {entry.digest}\n" for entry in (*known, key))
    replace_file(file, lambda target: target.write_text(lines, encoding="utf-8"))
    show({"name": name, "key": secret, "file": str(file)}, json)
