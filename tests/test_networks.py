"""Networks over item features: what they make of a support does not depend on its order, nor on padding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import known_interactions

from metarec.data.interactions import Ratings
from metarec.data.side import Side
from metarec.scorer import Request
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.network_forms import FORMS, Form
from metarec.scorers.collaborative.networks import Network, _initial
from metarec.scorers.collaborative.side_inputs import SideInputs
from metarec.scorers.collaborative.side_readers import reader_of

AMORTISED: list[Form] = ["neural process", "set transformer", "hypernetwork"]
FEATURES = 6


@cache
def network(form: Form) -> Network:
    """An untrained one, far from the item prior."""
    data = known_interactions()
    meta = _initial(form, FEATURES, 8, 0.1, 0)
    for name in FORMS[form].last:
        meta.init[f"{name}.weight"] *= 10
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(40, FEATURES)).astype(np.float32))
    return Network(form, meta, fit_item_mean(data, np.arange(30)), features, 3, 5.0, 3.5, 20)


def score(form: Form, *supports: Ratings) -> list[torch.Tensor]:
    return network(form).score([Request("", support, np.arange(40)) for support in supports])


def rated(*items: int) -> Ratings:
    return Ratings(np.array(items, np.int64), np.array([5.0 if item % 2 else 1.0 for item in items], np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_a_support_changes_nothing(form: Form) -> None:
    one, other, another = score(form, rated(1, 4, 7, 8), rated(8, 1, 7, 4), rated(1, 4, 7, 9))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (one - another).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_longer_support_beside_it_changes_nobodys_scores(form: Form) -> None:
    alone, nothing = score(form, rated(1, 4))[0], score(form, rated())[0]
    beside = score(form, rated(1, 4), rated(), rated(*range(20)))
    torch.testing.assert_close(beside[0], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(beside[1], nothing, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", AMORTISED)
def test_each_rating_is_read_with_its_item(form: Form) -> None:
    """The same items and the same ratings, but not of each other."""
    items = np.array([1, 4, 7, 8], np.int64)
    values = np.array([5.0, 1.0, 5.0, 1.0], np.float32)
    one, other = score(form, Ratings(items, values), Ratings(items, values[::-1].copy()))
    assert (one - other).abs().max() > 1e-3


def test_a_hypernetworks_scores_of_a_user_differ_by_one_vector_times_the_items_states() -> None:
    """So its change of the output layer has rank 1: of many users' differences, none leaves the states' span."""
    net = network("hypernetwork")
    supports = [rated(*np.random.default_rng(seed).choice(40, 6, replace=False)) for seed in range(12)]
    scores = torch.stack(score("hypernetwork", *supports))
    moved = scores - score("hypernetwork", rated())[0]
    init = net.meta.init
    hidden = torch.relu(net.features @ init["item.weight"].T + init["item.bias"])
    states = torch.cat([hidden, net.features], 1)
    fitted = torch.linalg.lstsq(states, moved.T).solution
    torch.testing.assert_close(states @ fitted, moved.T, atol=1e-4, rtol=1e-4)
    assert moved.abs().max() > 0.01
    assert net.bytes_per_user == 4 * states.shape[1]


def informed(form: Form) -> Network:
    """The same, reading a field of users and one of moments."""
    read = {name: reader_of(name, np.array(["a", "b"] * 10, object)) for name in ("group", "device")}
    side = SideInputs({"group": read["group"]}, {"device": read["device"]}, None, {"group": 1.0, "device": 2.0})  # type: ignore[dict-item]
    meta = _initial(form, FEATURES + 4, 8, 0.1, 0)
    for name in FORMS[form].last:
        meta.init[f"{name}.weight"] *= 10
    return replace(network(form), meta=meta, side=side)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_known_of_the_user_and_the_moment_is_an_input(form: Form) -> None:
    net, support = informed(form), rated(1, 4)

    def score(support: Ratings, group: str = "", rated: str = "", asked: str = "") -> torch.Tensor:
        side = Side(
            {"group": group},
            rated={"device": np.full(len(support), rated, object)},
            asked={"device": np.array([asked], object)},
        )
        return net.score([Request("", replace(support, side=side), np.arange(40))])[0]

    unknown = net.score([Request("", support, np.arange(40))])[0]
    torch.testing.assert_close(score(support), unknown)
    for changed in ({"group": "a"}, {"asked": "b"}, {"rated": "b"}):
        assert (score(support, **changed) - unknown).abs().max() > 1e-3, changed
    nothing = Ratings.empty()
    assert (score(nothing, group="a") - score(nothing, group="b")).abs().max() > 1e-3
    beside = net.score([Request("", support, np.arange(40)), Request("", rated(*range(20)), np.arange(40))])[0]
    torch.testing.assert_close(beside, unknown, atol=1e-5, rtol=1e-5)
