"""Shows what adapting does to one test user: what ``metarec quickstart`` prints at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from metarec.recommender import MetaRecommender


def show_one_user(recommender: MetaRecommender, run: Path, quiet: bool) -> dict[str, Any]:
    """Adapts to five ratings of the first test user, and shows the ranking before and after."""
    from metarec.files.artifacts import write_json

    catalog = recommender.fitted.catalog
    episode = recommender.task_data().episodes("test")[0][0]
    five = episode.support.head(5)
    rated = [(catalog.ids[code], float(value)) for code, value in zip(five.items, five.values, strict=True)]
    stranger, user = recommender.adapt([]), recommender.adapt(rated)
    seen = [item for item, _ in rated]
    before, after = stranger.recommend(10, exclude=seen), user.recommend(10)
    user.save(run / "user")
    story: dict[str, Any] = {
        "rated": [{"item": item, "title": catalog.title(catalog.find(item)), "rating": value} for item, value in rated],
        "before": [vars(entry) for entry in before],
        "after": [vars(entry) for entry in after],
        "seconds": user.seconds,
    }
    write_json(run / "user.json", story)
    if not quiet:
        typer.echo("\nA new user rates five movies:")
        for line in story["rated"]:
            typer.echo(f"  {line['rating']:g}  {line['title']}")
        typer.echo(f"\n  {'top ten before':48s}top ten after adapting ({user.seconds:.2f} s)")
        known = {entry.item for entry in before}
        for old, new in zip(before, after, strict=True):
            typer.echo(f"  {old.title[:46]:48s}{new.title[:46]}{'' if new.item in known else '  *'}")
        typer.echo("  (* was not in the top ten before)")
    return story
