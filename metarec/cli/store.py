"""The commands of a store: ``store ls | verify | gc | export | erase-user`` and ``export --vllm``.

It also runs ``adapt --users`` and ``recommend --store``.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import JsonOption, print_json, show
from metarec.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from metarec.data.source_options import SourceOptions
    from metarec.recommender import MetaRecommender
    from metarec.serve.store import AdapterStore

app = typer.Typer()
store_app = typer.Typer(help="Feedback and adapters on disk.", no_args_is_help=True)
app.add_typer(store_app, name="store")

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Directory of a store, or postgresql://...")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Directory of a store, or postgresql://... .", show_default=False),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="With --users: a Ray cluster adapts them. local starts one here, auto finds one; or HOST:PORT.",
        show_default=False,
    ),
]
AdaptersOption = Annotated[
    Path | None, typer.Option("--adapters", help="Directory of the adapters, with PostgreSQL.", show_default=False)
]


def _open(store: str, adapters: Path | None, create: bool = False) -> AdapterStore:
    from metarec.serve.store import AdapterStore

    return AdapterStore(store, adapters, create=create)


@store_app.command("ls", epilog="Example: metarec store ls runs/mine/store")
def ls(
    store: StoreArgument,
    adapters: AdaptersOption = None,
    users: Annotated[bool, typer.Option("--users", help="List every user.")] = False,
    json: JsonOption = False,
) -> None:
    """Print the number of users, ratings, adapters and added items in a store."""
    opened = _open(store, adapters)
    facts: dict[str, Any] = {"store": opened.location, **opened.sizes()}
    if not users:
        show(facts, json)
        return
    listed: list[dict[str, Any]] = [
        {
            "user": name,
            "ratings": len(opened.events(name)),
            "adapters": [record.version for record in opened.records(profile.key)],
        }
        for name, profile in opened.users()
    ]
    if json:
        print_json({**facts, "listed": listed})
        return
    for line in listed:
        versions = ", ".join(f"{version}" for version in line["adapters"]) or "none"
        typer.echo(f"{line['user']}\t{line['ratings']} ratings\tadapters: {versions}")


@store_app.command(epilog="Example: metarec store verify runs/mine/store")
def verify(store: StoreArgument, adapters: AdaptersOption = None, json: JsonOption = False) -> None:
    """Check every byte of every adapter; exit with status 1 if one is damaged. A server computes it again."""
    from metarec.system.progress import progress

    opened = _open(store, adapters)
    damaged = []
    with progress("verifying", opened.sizes()["adapters"], after=2.0) as advance:
        for done, (user, record) in enumerate(opened.verify_all(), start=1):
            if record is not None:
                damaged.append({"user": user, "version": record.version, "path": str(opened.path(record))})
            advance(done)
        checked = opened.sizes()["adapters"]
    if json:
        print_json({"checked": checked, "damaged": damaged})
    else:
        typer.echo(f"checked: {checked}\ndamaged: {len(damaged)}")
        for line in damaged:
            typer.echo(f"  version {line['version']} of '{line['user']}': {line['path']}")
    if damaged:
        raise typer.Exit(1)


@store_app.command(epilog="Example: metarec store quality runs/mine/store")
def quality(store: StoreArgument, adapters: AdaptersOption = None, json: JsonOption = False) -> None:
    """Print how well each served model foresaw the ratings that came, by K, and how far they are from its training."""
    from metarec.serve.watch import report

    rows = report(_open(store, adapters))
    if json:
        print_json({"models": rows})
        return
    if not rows:
        typer.echo("no feedback has been judged yet; a server adds it every few seconds")
    for row in rows:
        typer.echo(f"model {row['model']}: {row['feedback']} ratings, {row['not_judged']} not judged")
        typer.echo(f"  {'K':6s} {'ratings':>8s} {'pairs':>8s} {'AUC':>6s} {'log-loss':>9s} {'calibration error':>18s}")
        for part in (*row["by_shots"], {**row, "shots": "all"}):
            auc, loss, error = (_number(part[name]) for name in ("auc", "log_loss", "calibration_error"))
            counts = f"{part['ratings']:8d} {part['pairs']:8d}"
            typer.echo(f"  {part['shots']:6s} {counts} {auc:>6s} {loss:>9s} {error:>18s}")
        shifts = {
            "adaptations diverged": row["diverged"],
            "ratings of items unknown to it": row["of_unknown_items"],
            "drift of items": row.get("item_drift"),
            "drift of ratings": row.get("rating_drift"),
            "ratings higher by": row.get("rating_shift"),
        }
        typer.echo("  " + "; ".join(f"{what}: {_number(value)}" for what, value in shifts.items()))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@store_app.command(epilog="Example: metarec store gc runs/mine/store --keep 1")
def gc(
    store: StoreArgument,
    adapters: AdaptersOption = None,
    keep: Annotated[int, typer.Option(min=1, help="Newest versions of each user that stay.")] = 2,
    unknown_days: Annotated[
        float, typer.Option(min=0, help="Days for which adapters stay whose user the index does not know.")
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be removed.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove old versions and half-written directories. Safe while a server runs."""
    found = _open(store, adapters).gc(keep=keep, unknown=unknown_days * 86400, dry_run=dry_run)
    show({"would_remove" if dry_run else "removed": found.removed, **vars(found)}, json)


@store_app.command("export", epilog="Example: metarec store export runs/mine/store --user ann --out ann")
def export_user(
    store: StoreArgument,
    user: Annotated[str, typer.Option(help="The user's id.")],
    adapters: AdaptersOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Also copy the newest adapter here, as a PEFT directory.", show_default=False)
    ] = None,
) -> None:
    """Print everything that a store holds about a user, as JSON."""
    import shutil

    from metarec.files.artifacts import MANIFEST, replace_dir

    opened = _open(store, adapters)
    held = opened.export(user)
    profile = opened.profile(user)
    if held is None or profile is None:
        raise StoreError(f"'{store}' has no user '{user}'", "See: metarec store ls STORE --users")
    if out is not None:
        good = next((record for record in opened.records(profile.key) if opened.is_good(record)), None)
        if good is None:
            raise StoreError(f"'{user}' has no undamaged adapter", "Run: metarec recommend RUN --store STORE --user ID")
        with replace_dir(out, "adapter") as directory:
            for file in opened.path(good).iterdir():
                if file.name != MANIFEST:
                    shutil.copyfile(file, directory / file.name)
    print_json(held)


@store_app.command("erase-user", epilog="Example: metarec store erase-user runs/mine/store --user ann")
def erase_user(
    store: StoreArgument,
    user: Annotated[list[str], typer.Option(help="The user's id; may be repeated.")],
    adapters: AdaptersOption = None,
    json: JsonOption = False,
) -> None:
    """Erase users: ratings, index, adapters, write-ahead log. Running servers notice within seconds."""
    opened = _open(store, adapters)
    if missing := [name for name in user if opened.profile(name) is None]:
        raise StoreError(f"'{store}' has no user '{missing[0]}'", "See: metarec store ls STORE --users")
    opened.erase(*user)
    show({"erased": True}, json)


@store_app.command("pseudonym", epilog="Example: metarec store pseudonym runs/mine/store --user ann")
def pseudonym(
    store: StoreArgument,
    user: Annotated[str, typer.Option(help="The user's id.")],
    adapters: AdaptersOption = None,
    json: JsonOption = False,
) -> None:
    """Print what stands for a user in the audit log, whether or not the store has the user."""
    found = _open(store, adapters).pseudonym(user)
    if json:
        print_json({"pseudonym": found})
    else:
        typer.echo(found)


@app.command("export", epilog="Example: metarec export runs/mine/store --vllm --out lora --base-model /models/smollm2")
def export(
    store: StoreArgument,
    out: Annotated[Path, typer.Option(help="Directory that vLLM's LoRA resolver reads.")],
    vllm: Annotated[bool, typer.Option("--vllm", help="Write what vLLM reads; there is no other format yet.")] = False,
    adapters: AdaptersOption = None,
    user: Annotated[list[str] | None, typer.Option(help="Only this user; may be repeated.", show_default=False)] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Model that 'vllm serve' is called with (default: the adapter's own).", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write the newest adapters for another server, and print the name of each user's."""
    if not vllm:
        raise ConfigError("no format is chosen", "Add --vllm")
    from metarec.serve.vllm import export_adapters

    opened = _open(store, adapters)
    names = export_adapters(opened, out, users=user, base_model=base_model)
    if json:
        print_json(names)
        return
    for name, adapter in names.items():
        typer.echo(f"{adapter}\t{name}")


def adapt_bulk(
    load: Callable[[], MetaRecommender],
    feedback: Path,
    side: SourceOptions,
    store: str,
    adapters: Path | None,
    ray: str | None,
    json: bool,
) -> None:
    """Adapts every user of a CSV file; ``metarec adapt RUN --users FILE --store DIR [--side ...] [--ray ADDRESS]``.

    Args:
        load: Returns the recommender; called when the cluster has answered.
        feedback: The file.
        side: What else is known of the users, see `read_feedback`.
        store: Where adapters are kept.
        adapters: Directory of the adapters, with PostgreSQL.
        ray: Address of the Ray cluster that adapts them; None adapts them in this process.
        json: Prints the counts as JSON.
    """
    import time

    if ray is not None:
        from metarec.serve.ray_bulk import cluster
    with nullcontext() if ray is None else cluster(ray):
        from metarec.serve.batching import BULK_USERS_AT_ONCE, use_one_thread_per_batch
        from metarec.serve.bulk import adapt_users, read_feedback
        from metarec.serve.engine import Engine

        recommender, opened = load(), _open(store, adapters, create=True)
        workers = use_one_thread_per_batch()
        engine = Engine(recommender, opened, hot_bytes=0, users_at_once=BULK_USERS_AT_ONCE, workers=workers)
        users = read_feedback(feedback, engine, side)
        began = time.perf_counter()
        try:
            if ray is None:
                bulk = adapt_users(engine, users)
            else:
                from metarec.serve.ray_bulk import StorePlace, adapt_users_over_ray

                bulk = adapt_users_over_ray(engine, users, StorePlace.of(store, adapters))
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing is lost: run the same command again", err=True)
            raise
        seconds = time.perf_counter() - began
    show(
        {**vars(bulk), "seconds": round(seconds, 2), "users_per_second": round(len(users) / max(seconds, 1e-9), 1)},
        json,
    )
    if bulk.failed:
        typer.echo(f"{bulk.failed} users could not be adapted; run the same command again for these", err=True)
        raise typer.Exit(1)


def recommend_stored(
    recommender: MetaRecommender,
    store: str,
    adapters: Path | None,
    user: str,
    k: int,
    explain: bool,
    moment: Mapping[str, str],
    **chosen: Any,
) -> dict[str, Any]:
    """Ranks the catalog for a user of a store; ``metarec recommend RUN --store DIR --user U``.

    Args:
        recommender: The recommender.
        store: Where the store is.
        adapters: Directory of the adapters, with PostgreSQL.
        user: The user's id.
        k: How many items.
        explain: Adds the ratings that moved an item most.
        moment: Columns of the data's `context` to their values now.
        **chosen: ``diversity``, ``where`` and ``block`` of `Engine.recommend`.

    Returns:
        The adapter's version and the ranking, JSON-able.
    """
    import sys
    from dataclasses import asdict

    from metarec.serve.engine import Engine

    opened = _open(store, adapters)
    if opened.profile(user) is None:
        raise StoreError(f"'{store}' has no user '{user}'", "See: metarec store ls STORE --users")
    # For one ranking, scoring all items takes less time than preparing the first stage.
    engine = Engine(recommender, opened, candidates=sys.maxsize)
    person = engine.asking(engine.people([user])[user], {}, (), moment)
    person, ranked = engine.recommend(person, k, explain=explain, **chosen)
    return {
        "adapter": person.facts(),
        "items": [{**vars(entry), "because": [asdict(reason) for reason in reasons]} for entry, reasons in ranked],
    }
