"""The verbs of tasks: ``tasks list | show | validate | preview``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metarec.cli.options import CountingOption, JsonOption, print_json
from metarec.errors import MetarecError

if TYPE_CHECKING:
    from metarec.data.task import Task
    from metarec.data.task_data import TaskData

tasks_app = typer.Typer(help="Tasks: what can be measured, and what a model is shown.", no_args_is_help=True)

IncludeOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--include-path", help="Folder of your own FAMILY/NAME.yaml files; may be repeated.", show_default=False
    ),
]
TaskArgument = Annotated[str, typer.Argument(help="Task name, or a YAML file.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the split.")]


@tasks_app.command("list", epilog="Example: metarec tasks list --include-path my-tasks --json")
def list_tasks(include_path: IncludeOption = None, json: JsonOption = False) -> None:
    """List all tasks and groups, and whether their data is there."""
    from metarec.data.task_files import group_names, load_group, load_task, task_names

    found: list[dict[str, Any]] = []
    for name in task_names(include_path or []):
        try:
            task = load_task(name, include_path or [])
        except MetarecError as error:
            found.append({"name": name, "data": "broken", "description": str(error)})
            continue
        found.append({"name": name, "version": task.version, "data": _data(task), "description": task.description})
    groups = {}
    for name in group_names(include_path or []):
        try:
            members = load_group(name, include_path or [])
        except MetarecError as error:
            found.append({"name": name, "data": "broken", "description": str(error)})
            continue
        groups[name] = members
    if json:
        print_json({"tasks": found, "groups": groups})
        return
    for entry in found:
        typer.echo(f"{entry['name']:34s}{entry['data']:9s}{entry['description']}")
    for name, members in groups.items():
        typer.echo(f"{name:34s}{'group':9s}{', '.join(members)}")


def _data(task: Task) -> str:
    sets = [*task.dataset.parts.values()] or [task.dataset]
    there = [dataset.path is None or dataset.path.exists() for dataset in sets]
    if not all(there):
        return "absent"
    return "embedded" if all(dataset.path is None for dataset in sets) else "there"


@tasks_app.command("show", epilog="Example: metarec tasks show movielens/item-cold")
def show_task(name: TaskArgument, include_path: IncludeOption = None, json: JsonOption = False) -> None:
    """Print a task with all that it includes, and its digest."""
    import yaml

    from metarec.data.task_files import load_task

    task = load_task(name, include_path or [])
    values = {**task.model_dump(mode="json"), "digest": task.digest}
    if json:
        print_json(values)
    else:
        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110), nl=False)


@tasks_app.command("validate", epilog="Example: metarec tasks validate movielens --seed 1")
def validate(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Tasks, groups or YAML files; none means all whose data is there.", show_default=False),
    ] = None,
    include_path: IncludeOption = None,
    seed: SeedOption = 0,
    backbone: CountingOption = None,
    json: JsonOption = False,
) -> None:
    """Load, label, split and render tasks for real, and look for leaks; status 1 if one is not sound."""
    from metarec.data.task_files import load_group, load_task, task_names
    from metarec.system.progress import progress

    if backbone is not None:
        from metarec.lm.hub import check_backbone

        check_backbone(backbone)
    own = include_path or []
    chosen = [task for name in names for task in load_group(name, own)] if names else task_names(own)
    found: list[dict[str, Any]] = []
    with progress("validating", len(chosen), after=2.0) as advance:
        for done, name in enumerate(chosen, start=1):
            try:
                task = load_task(name, own)
                if not names and _data(task) == "absent":
                    found.append({"name": name, "sound": None, "said": "data absent, not checked"})
                else:
                    found.append({"name": name, **_validated(task, seed, backbone)})
            except MetarecError as error:
                found.append({"name": name, "sound": False, "said": str(error)})
            advance(done, name)
    if json:
        print_json({"tasks": found})
    else:
        for entry in found:
            mark = {True: "sound", False: "BROKEN", None: "skipped"}[entry["sound"]]
            typer.echo(f"{mark:9s}{entry['name']}: {entry['said']}")
            for count, parts in entry.get("shots", {}).items():
                users = ", ".join(
                    f"{part} {found['enough']} (left out: {found['left_out']})" for part, found in parts.items()
                )
                typer.echo(f"         {count} shots, enough ratings: {users}")
            if "tokens" in entry:
                facts = entry["tokens"]
                typer.echo(f"         tokens of a prompt: {facts['median']:g} (median), {facts['longest']} (longest)")
            if "features" in entry:
                typer.echo(f"         features: {_features(entry['features'])}")
            for sentence in entry.get("warnings", []):
                typer.echo(f"         warning: {sentence}")
    if any(entry["sound"] is False for entry in found):
        raise typer.Exit(1)


def _validated(task: Task, seed: int, backbone: str | None) -> dict[str, Any]:
    from metarec.data.seen_texts import cut_sentences
    from metarec.data.task_data import load_task_data
    from metarec.data.templates import cut_fields, hidden_state_texts

    data = load_task_data(task, seed)
    counts = {part: _counted(data, part) for part in ("validation", "test")}
    shots = {count: data.enough(count) for count in task.shots}
    faults = data.leaks() + [f"no {part} episode has enough ratings" for part, (kept, _) in counts.items() if not kept]
    if all(not found["train"][0] for count, found in shots.items() if count or len(shots) == 1):
        faults.append(f"no meta-training {task.by} has enough ratings for any of the shots {list(task.shots)}")
    faults += [
        f"no {part} episode has likes and dislikes" for part, (kept, both) in counts.items() if kept and not both
    ]
    catalog = data.interactions.catalog
    template = task.template
    prompts = [template.render(catalog, code) for code in range(len(catalog))]
    characters = task.prompt.characters
    for sentence in task.hidden_states:
        hidden_state_texts(catalog, sentence, characters=characters)
    repeated = len(prompts) - len(set(prompts))
    if len(set(prompts)) == 1:
        faults.append(f"all {len(prompts)} items have the same prompt: name a field in it that tells them apart")
    episodes = ", ".join(f"{kept} {part} episodes" for part, (kept, _) in counts.items())
    said = (
        "; ".join(faults)
        or f"{len(data.parts['train'])} meta-training {task.by}s, {episodes}, {repeated} items share a prompt"
    )
    cut = cut_fields(catalog, [task.prompt.text, task.item_text.text, *task.hidden_states], characters)
    tokens = _tokens(task, data, backbone) if backbone else {}
    task.item_text.render(catalog, 0)
    chosen = task.read_fields(catalog)
    return {
        "sound": not faults,
        "said": said,
        "shots": {
            str(count): {part: {"enough": kept, "left_out": left} for part, (kept, left) in found.items()}
            for count, found in shots.items()
        },
        "warnings": [
            *data.interactions.notes,
            *cut_sentences(cut, characters),
            *_left_out(task, shots),
            *([tokens.pop("cut")] if "cut" in tokens else []),
        ],
        **({"tokens": tokens} if tokens else {}),
        "cut_fields": cut,
        "features": {"text": task.item_text.text, "fields": dict(chosen.read), "unread": dict(chosen.unread)},
        "hashes": data.hashes,
        "dropped": dict(data.interactions.dropped),
    }


def _tokens(task: Task, data: TaskData, name: str) -> dict[str, Any]:
    """Counts the tokens of every item's prompt, or of its text where an encoder reads it.

    Raises:
        MetarecError: The model cannot take the prompts, as `fit` would say.
    """
    from metarec.lm.loading import load_backbone
    from metarec.lm.tokenized import count_tokens, tokenize_catalog

    backbone, catalog = load_backbone(name), data.interactions.catalog
    template = task.item_text if backbone.kind == "encoder" else task.template
    counts = count_tokens(backbone, template, catalog)
    if backbone.kind != "encoder":
        tokenize_catalog(backbone, template, catalog)
    facts = {"model": name, "longest": counts.longest, "median": counts.median, "limit": counts.limit}
    facts["cut_items"] = len(counts.over)
    if counts.over:
        facts["cut"] = f"{len(counts.over)} of {len(catalog)} texts are cut at the {counts.limit} tokens of '{name}'"
    return facts


def _features(found: dict[str, Any]) -> str:
    """Says what is read of an item beside its ratings."""
    fields = ", ".join(f"{name} ({kind})" for name, kind in found["fields"].items()) or "none"
    unread = ", ".join(f"{name} ({why})" for name, why in found["unread"].items())
    return f"text {found['text']!r}, fields {fields}" + (f", no fields {unread}" if unread else "")


def _left_out(task: Task, shots: dict[int, Any]) -> list[str]:
    """Says of which parts nobody has enough ratings for some number of shots, and what to do."""
    possible = [count for count, found in shots.items() if count and found["train"][0]]
    needed = f"train.shots (--set 'train.shots={possible}')" if possible else "lower 'shots'"
    in_training = f"fit needs {needed}, or a lower 'query.min'"
    asked = {"train": task.query.min_to_train, "validation": task.query.min, "test": task.query.min}
    said = []
    for count, found in shots.items():
        for part, (kept, _) in found.items():
            if not kept:
                whom, cure = (
                    ("meta-training", in_training) if part == "train" else (part, "lower 'shots' or 'query.min'")
                )
                said.append(
                    f"with {count} shots no {whom} {task.by} has the {count} ratings and {asked[part]} to ask "
                    f"about: {cure}"
                )
    return said


def _counted(data: TaskData, part: Any) -> tuple[int, int]:
    episodes, _ = data.episodes(part)
    labels = [episode.query.likes(data.task.like_threshold) for episode in episodes]
    return len(episodes), sum(bool(liked.any() and not liked.all()) for liked in labels)


@tasks_app.command("preview", epilog="Example: metarec tasks preview movielens/user-cold --episodes 2")
def preview(
    name: TaskArgument,
    include_path: IncludeOption = None,
    seed: SeedOption = 0,
    episodes: Annotated[int, typer.Option(min=1, help="How many test episodes.")] = 1,
    items: Annotated[int, typer.Option(min=1, help="How many items of each support and query.")] = 3,
    json: JsonOption = False,
) -> None:
    """Show the first test episodes as a model sees them: prompts with their answers, and what it reads besides."""
    from metarec.data.seen_texts import cut_sentences
    from metarec.data.task_data import load_task_data
    from metarec.data.task_files import load_task
    from metarec.data.templates import cut_fields, hidden_state_texts

    task = load_task(name, include_path or [])
    data = load_task_data(task, seed)
    catalog, template, characters = data.interactions.catalog, task.template, task.prompt.characters
    read = [hidden_state_texts(catalog, sentence, characters=characters) for sentence in task.hidden_states]
    shown: list[dict[str, Any]] = []
    for episode in data.episodes("test")[0][:episodes]:
        sides = {}
        for side, ratings in (("support", episode.support), ("query", episode.query)):
            liked = ratings.likes(task.like_threshold)
            sides[side] = [
                {
                    "prompt": template.render(catalog, int(code)),
                    "rating": round(float(value), 3),
                    "answer": task.prompt.positive if like else task.prompt.negative,
                    "recall": [texts[code] for texts in read],
                }
                for code, value, like in list(zip(ratings.items, ratings.values, liked, strict=True))[:items]
            ]
        sizes = {"support_size": len(episode.support), "query_size": len(episode.query)}
        shown.append({task.by: episode.user, **sizes, **sides})
    cut = cut_fields(catalog, [task.prompt.text, *task.hidden_states], characters)
    if json:
        print_json({"task": name, "hashes": data.hashes, "episodes": shown, "cut_fields": cut})
        return
    for episode_facts in shown:
        typer.echo(f"{task.by} {episode_facts[task.by]}")
        for side in ("support", "query"):
            typer.echo(f"\n{side}, {len(episode_facts[side])} of {episode_facts[f'{side}_size']}:")
            for entry in episode_facts[side]:
                typer.echo(f"---\n{entry['prompt']}{entry['answer']}    (rating {entry['rating']:g})")
                for text in entry["recall"]:
                    typer.echo(f"besides: {text}")
        typer.echo("")
    for sentence in cut_sentences(cut, characters):
        typer.echo(f"warning: {sentence}")
