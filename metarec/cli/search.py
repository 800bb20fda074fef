"""The verbs ``search | profile``: items by text; a sentence about a person or an item."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from metarec.cli.options import (
    AboutOption,
    DeviceOption,
    JsonOption,
    RatingOption,
    RatingsOption,
    person_facts,
    print_json,
)
from metarec.cli.people import adapted
from metarec.cli.runs import load_run
from metarec.errors import ConfigError

app = typer.Typer()


@app.command(
    epilog="Example: metarec search runs/mine 'robots that dream'; for a person: "
    "metarec search runs/mine 'space comedy' --rating 'Alien=5'"
)
def search(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    query: Annotated[str, typer.Argument(help="Words of a title, or a description.")],
    user: Annotated[str | None, typer.Option(help="An adapter written by 'metarec adapt'.", show_default=False)] = None,
    rating: RatingOption = None,
    ratings: RatingsOption = None,
    about: AboutOption = None,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    weight: Annotated[
        float, typer.Option(help="How much the person's order counts beside one of the text's.", min=0)
    ] = 1.0,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Find items by words and by meaning; with a person, those they would like come first."""
    if user is not None and (rating or ratings or about):
        raise ConfigError("--user and ratings are both given", "A saved person brings their own ratings")
    recommender = load_run(run, device=device)
    person = recommender.load_user(user) if user else None
    if rating or ratings or about:
        person = adapted(recommender, rating, ratings, person_facts(about, None, None))
    found = recommender.search(query, k, user=person, weight=weight)
    if json:
        print_json([vars(entry) for entry in found])
        return
    for place, entry in enumerate(found, start=1):
        scored = "" if entry.score is None else f"  {entry.score:+.3f}"
        typer.echo(f"{place:3d}  {entry.similarity:.3f}{scored}  {entry.title}")


@app.command(
    epilog="Example: metarec profile runs/mine --rating 'Toy Story=5' --rating 'Alien=2'; of an item: "
    "metarec profile runs/mine --item Alien --generate"
)
def profile(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    item: Annotated[
        str | None, typer.Option(help="Describe this item, by title or id, instead of a person.", show_default=False)
    ] = None,
    user: Annotated[str | None, typer.Option(help="An adapter written by 'metarec adapt'.", show_default=False)] = None,
    rating: RatingOption = None,
    ratings: RatingsOption = None,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Let the language model write; claims that the evidence lacks are left out."),
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Say in a sentence what a person likes, from their ratings, or what an item is, from the catalog."""
    if (item is not None) + (user is not None) + bool(rating or ratings) > 1:
        raise ConfigError("--item, --user and ratings exclude each other", "Give one of them")
    recommender = load_run(run, device=device)
    if item is not None:
        said = recommender.describe(item, generate=generate)
    else:
        person = recommender.load_user(user) if user else adapted(recommender, rating, ratings, {})
        said = recommender.profile(person, generate=generate)
    if json:
        print_json(asdict(said))
        return
    typer.echo(said.text)
