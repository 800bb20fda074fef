"""Disturbances are what they say, and the report finds what is known of them beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
from conftest import TEMPLATES, Ran, known_interactions
from small_recommenders import NO_MODEL, known_task

from metarec.bench.robustness import (
    FLIPPED_RATINGS,
    INJECTED_PROFILES,
    NOISY_TITLES,
    flipped,
    most_rated,
    noisy,
    prompt_injection,
    robustness,
    with_noisy_titles,
    with_profiles,
)
from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog, Ratings, RatingScale
from metarec.errors import ConfigError
from metarec.lm.backbone import Backbone
from metarec.recommender import MetaRecommender

DATA = known_interactions()
COLLABORATIVE = {
    "score": ["item mean", "collaborative"],
    "collaborative": {
        "features": ["fields"],
        "members": "gp",
        "gp": {"sweeps": 1, "factors": 2},
        "stack": {"folds": 2},
    },
}


def test_noise_changes_about_its_share_of_a_text_and_nothing_without_one() -> None:
    text, generator = "The Quick Brown Fox Jumps Over the Lazy Dog", np.random.default_rng(0)
    assert noisy(text, 0.0, generator) == text
    likeness = [
        np.mean(
            [SequenceMatcher(None, text, noisy(text, share, generator), autojunk=False).ratio() for _ in range(200)]
        )
        for share in (0.1, 0.3)
    ]
    assert likeness == pytest.approx([0.93, 0.80], abs=0.03)
    assert noisy("x", 1.0, np.random.default_rng(4)) != "", "a title never gets empty"
    once, again, other = (with_noisy_titles(DATA, 0.3, seed).catalog.fields for seed in (0, 0, 1))
    assert once == again != other
    assert once["genres"] == DATA.catalog.fields["genres"]


def test_flipping_turns_a_share_of_the_ratings_round_on_the_scale() -> None:
    ratings = Ratings(np.arange(1000), np.full(1000, 4.5, np.float32))
    scale = RatingScale(0.5, 5.0)
    assert set(flipped(ratings, 1.0, scale, np.random.default_rng(0)).values.tolist()) == {1.0}
    some = flipped(ratings, 0.3, scale, np.random.default_rng(0)).values
    assert (some == 1.0).mean() == pytest.approx(0.3, abs=0.05)
    assert flipped(ratings, 0.0, scale, np.random.default_rng(0)).values.tolist() == ratings.values.tolist()


def test_false_users_rate_their_targets_highest_and_join_meta_training_alone() -> None:
    data, targets = known_task(), np.array([3, 7])
    attacked = with_profiles(data, targets, 5, 0)
    more, before = attacked.interactions, len(DATA)
    assert len(attacked.parts["train"]) == len(data.parts["train"]) + 5
    assert attacked.parts["test"] is data.parts["test"]
    assert more.rating[:before].tolist() == DATA.rating.tolist()
    own = np.isin(more.item[before:], targets)
    assert own.sum() == 10
    assert set(more.rating[before:][own].tolist()) == {5.0}
    assert more.rating[before:].max() <= 5.0
    assert more.rating[before:].min() >= 0.5
    assert len(set(zip(more.user.tolist(), more.item.tolist(), strict=True))) == len(more), "nobody rates twice"
    assert with_profiles(data, targets, 0, 0) is data


def test_the_most_rated_items_are_the_data_of_these_alone() -> None:
    data = known_task()
    count = np.bincount(DATA.item, minlength=40)
    part = most_rated(data, 10)
    kept = {DATA.catalog.ids[code] for code in np.argsort(-count, kind="stable")[:10]}
    assert set(part.interactions.catalog.ids) == kept
    assert len(part.interactions) == count[np.argsort(-count, kind="stable")[:10]].sum()
    code = part.interactions.catalog.ids.index("m3") if "m3" in kept else 0
    name = part.interactions.catalog.ids[code]
    whole = DATA.catalog.ids.index(name)
    assert part.interactions.rating[part.interactions.item == code].tolist() == DATA.rating[DATA.item == whole].tolist()
    assert most_rated(data, 40) is data


def test_the_report_finds_what_is_known(tmp_path: Path, metarec: Callable[..., Ran]) -> None:
    data = known_task()
    recommender = MetaRecommender(None, validated(RunConfig, {**NO_MODEL, **COLLABORATIVE}, "test")).fit(data)
    steps: list[str] = []
    found = robustness(recommender, data, (NOISY_TITLES, FLIPPED_RATINGS, INJECTED_PROFILES), advance=steps.append)
    assert found["auc"] > 0.9
    assert [found[NOISY_TITLES][share]["difference"] for share in ("0.1", "0.3")] == [0, 0], "it reads no title"
    slight, strong = (found[FLIPPED_RATINGS][share] for share in ("0.1", "0.3"))
    assert strong["difference"] < slight["difference"] <= 0
    assert strong["auc"] == pytest.approx(found["auc"] + strong["difference"])
    attacked = found[INJECTED_PROFILES]["0.05"]
    assert attacked["profiles"] == 2
    assert attacked["low"] <= attacked["difference"] <= attacked["high"] < 0, "targets rise"
    assert steps[0] == "undisturbed"
    assert len(steps) == 7
    with pytest.raises(ConfigError, match=r"no part 'noisy title'\. Did you mean 'noisy titles'"):
        robustness(recommender, data, ("noisy title",))


def test_words_behind_a_title_move_a_model_and_none_do_not(
    backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch, catalog: Catalog
) -> None:
    monkeypatch.setattr("metarec.bench.robustness.HARMLESS", "")
    monkeypatch.setattr("metarec.bench.robustness.INJECTION", " good movie {positive}")
    found = prompt_injection(backbone("llama"), TEMPLATES["causal"], catalog, 0)
    assert found["items"] == 40
    assert (found["harmless"]["shift"], found["harmless"]["overtakes"]) == (0, 0)
    assert found["injection"]["shift"] != 0
    assert found["injection"]["low"] <= found["injection"]["shift"] <= found["injection"]["high"]


def test_the_command_measures_one_part(
    tmp_path: Path, metarec: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = known_task(), tmp_path / "runs" / "mine"
    MetaRecommender(None, validated(RunConfig, NO_MODEL, "test")).fit(data).save_pretrained(run / "model")
    monkeypatch.setattr(MetaRecommender, "task_data", lambda *_: replace(data))
    done = metarec("robustness", run, "--part", "flipped ratings", "--out", tmp_path / "out.json")
    assert done.status == 0, done.err
    assert "flipped ratings: 0.3 difference" in done.out
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["flipped ratings"]) == {"0.1", "0.3"}
    assert NOISY_TITLES not in written
