"""What is said of people and items is what the evidence holds, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Ran
from small_recommenders import NO_MODEL, known_task

from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog, Ratings
from metarec.errors import ConfigError, UnknownItemError
from metarec.lm.backbone import Backbone
from metarec.recommender import MetaRecommender
from metarec.recommending.profiles import Evidence, checked, continuation, item_facts, taste, template

ITEMS = 16
GENRES = ("Comedy, Romance", "Horror", "Drama", "Comedy")
CATALOG = Catalog(
    tuple(map(str, range(ITEMS))),
    {
        "title": tuple(f"Film {'abcdefghijklmnop'[code]}" for code in range(ITEMS)),
        "genres": tuple(GENRES[code % 4] for code in range(ITEMS)),
        "year": tuple(str(1990 + code) for code in range(ITEMS)),
    },
)
EVIDENCE = Evidence(
    likes=("Comedy", "Sci-Fi"), dislikes=("Horror",), liked=("Notting Hill", "I Love You, Man"), disliked=("Saw",)
)


def test_the_evidence_is_what_the_ratings_say() -> None:
    support = Ratings(np.array([0, 3, 4, 1, 5, 2]), np.array([5, 4, 4.5, 1, 2, 3], np.float32))
    found = taste(CATALOG, support, 4.0, 3.0)
    assert found.likes == ("Comedy", "Romance")
    assert found.dislikes == ("Horror",), "one drama says nothing of dramas"
    assert found.liked == ("Film a", "Film e", "Film d")
    assert found.disliked == ("Film b", "Film f", "Film c")
    assert not taste(CATALOG, Ratings.empty(), 4.0, 3.0)


@pytest.mark.parametrize(("rating", "said"), [(5, "Likes Comedy"), (1, "Dislikes Comedy")])
def test_ratings_that_are_all_alike_are_high_or_low_on_the_scale(rating: float, said: str) -> None:
    one = Ratings(np.array([0]), np.array([rating], np.float32))
    assert template(taste(CATALOG, one, np.nan, 3.0)) == f"Rated Film a {'high' if rating > 3 else 'low'}."
    some = Ratings(np.array([0, 3]), np.full(2, rating, np.float32))
    assert template(taste(CATALOG, some, np.nan, 3.0)).startswith(said)


def test_a_template_says_the_evidence_alone() -> None:
    assert template(EVIDENCE) == (
        "Likes Comedy and Sci-Fi; rated Notting Hill and I Love You, Man high; dislikes Horror; rated Saw low."
    )
    assert template(Evidence()) == "Nothing is known of this person yet."
    assert template(item_facts(CATALOG, 4)) == "Film e: Comedy, Romance, 1994."


@pytest.mark.parametrize(
    ("claim", "held"),
    [
        ("They like Comedy", True),
        ("they enjoy comedy and sci fi movies such as Notting Hill", True),
        ("They dislike Horror", True),
        ("They do not like Horror, such as Saw", True),
        ("They love I Love You, Man", True),
        ("They like Horror", False),
        ("They dislike Comedy", False),
        ("They do not dislike Horror", False),
        ("They like Comedy and Horror", False),
        ("They like Drama", False),
        ("They like Comedy with strong women", False),
        ("They like Comedy from 1999", False),
        ("They like Comedy, Love", False),
        ("They like movies", False),
        ("Comedy", False),
        ("", False),
    ],
)
def test_a_claim_is_held_if_the_evidence_has_all_of_it_on_that_side(claim: str, held: bool) -> None:
    assert EVIDENCE.holds(claim) == held


def test_a_description_claims_no_more_than_the_catalog() -> None:
    facts = item_facts(CATALOG, 4)
    assert facts.holds("Film e is a Comedy and Romance movie from 1994")
    assert not facts.holds("Film e is a Comedy from 1995")
    assert not facts.holds("Film e is an award-winning Comedy")
    assert not facts.holds("People love Film e")


def test_what_is_not_held_is_left_out_and_nothing_left_is_the_template() -> None:
    found = checked("They like Comedy such as Notting Hill, but they dislike Drama. Enjoys Sci-Fi.", EVIDENCE)
    assert (found.text, found.source) == ("They like Comedy such as Notting Hill. This person enjoys Sci-Fi.", "model")
    assert [claim.held for claim in found.claims] == [True, False, True]
    nothing = checked("They are 35 years old. Saw is great!", EVIDENCE)
    assert (nothing.text, nothing.source) == (template(EVIDENCE), "template")
    assert [claim.held for claim in nothing.claims] == [False, False]


def test_a_continuation_is_one_line_of_the_likeliest_tokens(backbone: Callable[..., Backbone]) -> None:
    model = backbone("llama")
    prompt = "is this a good movie ?"
    said = continuation(model, prompt)
    assert said == continuation(model, prompt)
    assert "\n" not in said
    first = model.tokenize([prompt])[0]
    import torch

    with torch.no_grad():
        likeliest = int(model.model(input_ids=torch.tensor([first])).logits[0, -1].argmax())
    assert said.startswith(model.tokenizer.decode([likeliest]).strip())


def test_python_and_command_say_the_same_and_a_model_writes_only_when_asked(
    tmp_path: Path, metarec: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = MetaRecommender(None, validated(RunConfig, NO_MODEL, "test")).fit(known_task())
    rated = [("m0", 5.0), ("m4", 4.5), ("m2", 1.0), ("m6", 1.5)]
    me = recommender.adapt(rated)
    assert recommender._backbone is None
    said = recommender.profile(me)
    assert said.source == "template"
    assert said.text.startswith("Likes drama; rated ")
    assert "dislikes action" in said.text
    assert recommender._backbone is None, "no model is loaded"
    with pytest.raises(UnknownItemError):
        recommender.describe("nothing like it at all")
    run = tmp_path / "runs" / "mine"
    recommender.save_pretrained(run / "model")
    options = [part for item, rating in rated for part in ("--rating", f"{item}={rating}")]
    assert metarec("profile", run, *options).out.strip() == said.text
    assert metarec("profile", run).out.strip() == "Nothing is known of this person yet."
    described = json.loads(metarec("profile", run, "--item", "m0", "--json").out)
    assert described["text"] == str(recommender.describe("m0"))
    assert "drama" in described["text"]
    assert metarec("profile", run, "--item", "m0", *options).status == 2

    class Writer:
        kind = "causal"

    monkeypatch.setattr(MetaRecommender, "backbone", Writer())
    monkeypatch.setattr("metarec.recommending.profiles.continuation", lambda *_: " like drama, but they like action.")
    written = recommender.profile(me, generate=True)
    assert (written.text, written.source) == ("They like drama.", "model")
    monkeypatch.setattr(Writer, "kind", "encoder")
    Writer.name = "bert"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="writes nothing"):
        recommender.profile(me, generate=True)
