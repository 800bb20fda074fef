"""An ensemble is the mean of standardized scores, and the verb says what it is worth beside its members."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ran, known_interactions

from metarec.data.interactions import Ratings
from metarec.errors import ConfigError
from metarec.scorer import Request
from metarec.scorers.collaborative.foldin import fit_item_knn
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.trivial import ItemMean
from metarec.scorers.ensemble import Ensemble
from metarec.scorers.serialization import load_scorer, save_scorer


@dataclass(frozen=True)
class Fixed:
    values: tuple[float, ...]
    name: str = "fixed"
    bytes_per_user: int = 3

    def score(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        return [torch.tensor(self.values)[: len(request.candidates)] for request in requests]


REQUEST = Request("a", Ratings.empty(), np.array([0, 1, 2]))


def test_every_member_counts_alike_whatever_its_scale() -> None:
    scores = Ensemble((Fixed((1.0, 2.0, 3.0)), Fixed((3000.0, 1000.0, 2000.0)))).score([REQUEST])[0]
    unit = np.sqrt(1.5)
    assert scores.tolist() == pytest.approx([(-unit + unit) / 2, -unit / 2, unit / 2], abs=1e-6)
    assert Ensemble((Fixed((1.0,)), Fixed((1.0,)))).bytes_per_user == 6


def test_a_member_that_orders_nothing_leaves_the_others_order() -> None:
    scores = Ensemble((Fixed((1.0, 2.0, 3.0)), Fixed((5.0, 5.0, 5.0)))).score([REQUEST])[0]
    assert scores.argsort().tolist() == [0, 1, 2]
    assert torch.isfinite(scores).all()
    assert len(Ensemble((Fixed(()), Fixed(()))).score([Request("a", Ratings.empty(), np.zeros(0, np.int64))])[0]) == 0


def test_an_ensemble_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="an ensemble of 1"):
        Ensemble((Fixed((1.0,)),))


def test_a_saved_ensemble_scores_the_same(tmp_path: Path) -> None:
    data = known_interactions()
    prior = fit_item_mean(data, np.arange(40))
    made = Ensemble((ItemMean(prior), fit_item_knn(data, np.arange(40), prior)))
    requests = [Request("a", data.ratings(data.rows_of_user[50][:6]), np.arange(10, 30))]
    save_scorer(tmp_path / "both", made)
    assert torch.equal(load_scorer(tmp_path / "both").score(requests)[0], made.score(requests)[0])


def test_the_verb_compares_the_mean_with_each_run(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    table = tmp_path / "ratings.csv"
    data = known_interactions()
    rows = zip(data.user, data.item, data.rating, strict=True)
    lines = [
        f"{data.users[user]},{data.catalog.ids[item]},{rating:g},{data.catalog.fields['title'][item]} {item}"
        for user, item, rating in rows
    ]
    table.write_text("\n".join(["user,item,rating,title", *lines]))
    small = ["--set", "score=[item mean]", "--set", "collaborative.members=none", "--set", "train.steps=2"]
    small += ["--set", "collaborative.features=[fields]", "--set", "train.validate_every=2", "--runs", tmp_path]
    for name, more in (("one", []), ("two", ["--set", "meta.inner_steps=0"]), ("other", ["--seed", "5"])):
        assert metarec("train", table, "--name", name, *small, *more).status == 0
    ran = metarec("ensemble", tmp_path / "one", tmp_path / "two", "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert {row["method"] for row in found["rows"]} >= {"item mean", "one", "two", "ensemble"}
    assert set(found["ensemble"]["against"]) == {"one", "two"}
    refused = metarec("ensemble", tmp_path / "one", tmp_path / "other")
    assert refused.status == 2
    assert "another split" in refused.err
    assert metarec("ensemble", tmp_path / "one").status == 2
    twice = metarec("ensemble", tmp_path / "one", tmp_path / "." / "one")
    assert (twice.status, "named twice" in twice.err) == (2, True), twice.err
    (tmp_path / "two").rename(tmp_path / "ensemble")
    found = json.loads(metarec("ensemble", tmp_path / "one", tmp_path / "ensemble", "--json").out)
    assert set(found["ensemble"]["against"]) == {"one", str(tmp_path / "ensemble")}
