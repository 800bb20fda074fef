"""The posterior of a learned prior: against linear algebra by hand, and a recommender that starts at the EM kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_losses import numeric_gradients
from small_recommenders import SETTINGS, known_task
from torch import Tensor

from metarec.bench.methods import METHODS, MethodContext
from metarec.config import RunConfig, validated
from metarec.data.episodes import Episode, training_batch
from metarec.data.task_data import TaskData
from metarec.errors import ConfigError
from metarec.meta.algorithms import closed_form, maml
from metarec.meta.heads import DKT, WeightPrior, leave_one_out_errors, posterior_head
from metarec.meta.inner_loop import MetaState, initial_meta_state
from metarec.recommender import MetaRecommender
from metarec.scorer import Request
from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel
from metarec.scorers.language import weight_prior
from metarec.scorers.language.weight_prior import KernelMean, fit_weight_prior
from metarec.serve.items import extend
from metarec.system.tensors import AdapterState, expand_users
from metarec.training.fitting import Prepared, prepare
from metarec.training.meta_training import _meta_gradient

ModelDir = Callable[[str], Path]
USERS, ITEMS, FEATURES = 3, 6, 4
FEATURES_OF_LLAMA = 16
REAL = torch.arange(ITEMS) < torch.tensor([[6], [3], [0]])
KERNEL: dict[str, Any] = {
    **SETTINGS,
    "score": ["kernel mean", "adapter"],
    "collaborative": {"features": ["fields"], "members": "none"},
    "meta": {"algorithm": "dkt"},
    "train": {**SETTINGS["train"], "steps": 4, "validate_every": 4},
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made_tastes() -> tuple[Tensor, Tensor, AdapterState, WeightPrior]:
    """Features, and ratings by weights that are draws of a prior; the prior as parameters with a user dimension."""
    prior = WeightPrior(0.3 * drawn(FEATURES + 1, seed=1), drawn(FEATURES + 1, FEATURES + 1, seed=2), 0.4)
    features = drawn(USERS, ITEMS, FEATURES)
    weights = prior.mean + drawn(USERS, FEATURES + 1, seed=3) @ prior.root.T
    values = (biased(features) @ weights.unsqueeze(-1)).squeeze(-1) + 0.4**0.5 * drawn(USERS, ITEMS, seed=4)
    return features, values, expand_users(DKT.start(prior), USERS), prior


def biased(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


def test_the_posterior_is_bayesian_linear_regression_on_each_users_own_ratings() -> None:
    features, values, parameters, prior = made_tastes()
    found = posterior_head(features, values, REAL, parameters)
    for user in range(USERS):
        rated, rest = biased(features[user][REAL[user]]), values[user][REAL[user]]
        precision = torch.linalg.inv(prior.root @ prior.root.T) + rated.T @ rated / prior.noise
        away = torch.linalg.solve(precision, rated.T @ (rest - rated @ prior.mean) / prior.noise)
        torch.testing.assert_close(found[user], (prior.mean + away)[:-1])
    torch.testing.assert_close(found[2], prior.mean[:-1])  # who rated nothing is expected to be like the mean
    assert (found[0] - found[2]).abs().max() > 0.1


def test_leave_one_out_errors_are_those_of_posteriors_without_each_rating() -> None:
    features, values, parameters, prior = made_tastes()
    found = leave_one_out_errors(features, values, REAL, parameters)
    assert not found[~REAL].any()
    one = {name: value[:1] for name, value in parameters.items()}
    for left_out in range(ITEMS):
        others = torch.arange(ITEMS) != left_out
        rated, rest = biased(features[0][others]), values[0][others] - biased(features[0][others]) @ prior.mean
        covariance = rated @ prior.root @ prior.root.T @ rated.T + prior.noise * torch.eye(ITEMS - 1)
        weights = prior.mean + prior.root @ prior.root.T @ rated.T @ torch.linalg.solve(covariance, rest)
        expected = values[0, left_out] - biased(features[0, left_out]) @ weights
        torch.testing.assert_close(found[0, left_out], expected)
        head = posterior_head(features[:1], values[:1], others[None], one)
        torch.testing.assert_close(head[0], weights[:-1])


@pytest.mark.parametrize("steps", [None, 0, 2])
def test_meta_gradients_through_the_posterior_match_finite_differences(steps: int | None) -> None:
    """In closed form, and by second-order MAML whose steps change the features that the posterior is fitted on."""

    features, values, parameters, _ = made_tastes()
    queries = features.flip(1) + 0.3
    init = {**{name: value[0] for name, value in parameters.items()}, "m": torch.eye(FEATURES, dtype=torch.float64)}
    meta = MetaState(init, {}) if steps is None else initial_meta_state(init, ["m"], 0.02)

    def solve(state: AdapterState) -> AdapterState:
        shaped = features @ state["m"]
        return {**state, "head": posterior_head(shaped, values, REAL, state)}

    def errors(state: AdapterState) -> Tensor:
        return leave_one_out_errors(features @ state["m"], values, REAL, state).square().sum(1)

    def query(state: AdapterState) -> Tensor:
        predicted = (queries @ state["m"] @ solve(state)["head"].unsqueeze(-1)).squeeze(-1)
        return (predicted - values.flip(1)).square().mean(1)

    def outer(moved: MetaState) -> Tensor:
        state = expand_users(moved.init, USERS)
        for step in range(steps or 0):
            with torch.enable_grad():
                leaf = state["m"].detach().clone().requires_grad_()
                slope = torch.autograd.grad(errors({**state, "m": leaf}).sum(), leaf)[0]
            state = {**state, "m": state["m"] - moved.rate("m", step) * slope}
        return query(state).mean()

    found = (
        closed_form(meta, lambda state: state, query, USERS)
        if steps is None
        else maml(meta, errors, query, USERS, steps)
    )
    for name, gradient in numeric_gradients(meta, outer, meta.tensors()).items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert found.gradients["init/root"].abs().max() > 1e-3


def configured(**changed: Any) -> RunConfig:
    return validated(RunConfig, {**KERNEL, **changed}, "test")


def prepared(path: Path, data: TaskData, **changed: Any) -> Prepared:
    config = configured(**changed)
    return prepare(data, config, MetaRecommender.from_pretrained(path, config).backbone)


def requests(data: TaskData, count: int) -> list[Request]:
    episodes = data.evaluated("test")[0]
    return [Request(one.user, one.support.head(count), one.query.items) for one in episodes]


def some_users(data: TaskData) -> list[Episode]:
    """Four meta-training users."""
    return training_batch(
        data.interactions, data.parts["train"], batch_users=4, shots=(5,), max_query=10, min_query=5, seed=0, step=0
    )


@pytest.mark.parametrize("ratings", [0, 5, 10])
def test_before_training_the_posterior_scores_like_the_kernel_fitted_by_expectation_maximization(
    ratings: int, model_dir: ModelDir
) -> None:
    """But for a constant of each user, which orders nothing."""
    data = known_task()
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), configured()).prepare(data)
    model = recommender.fitted.answer_model
    assert model is not None
    features = model.features(model.states).numpy().astype(np.float64)
    kernel = fit_linear_kernel(data.interactions, data.parts["train"], features, name="x", shrinkage=0.0)
    asked = requests(data, ratings)
    personal = []
    for found, expected in zip(recommender.scorer().score(asked), kernel.score(asked), strict=True):
        torch.testing.assert_close(found - found.mean(), expected.float() - expected.float().mean(), atol=2e-3, rtol=0)
        personal.append(float((found - found.mean()).std()))
    assert min(personal) > (0.1 if ratings else 0.01)


def test_a_user_without_ratings_and_one_who_is_not_adapted_have_the_priors_mean(model_dir: ModelDir) -> None:
    data = known_task()
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), configured()).fit(data)
    rated, nothing = (
        requests(data, 10)[:2],
        [replace(one, support=one.support.head(0)) for one in requests(data, 10)[:2]],
    )
    unadapted = recommender.scorer(steps=0).score(rated)
    for found, expected in zip(recommender.scorer().score(nothing), unadapted, strict=True):
        torch.testing.assert_close(found, expected)
    adapted = recommender.scorer().score(rated)
    assert min(float((found - expected).abs().max()) for found, expected in zip(adapted, unadapted, strict=True)) > 0.1


def test_a_user_holds_their_head_and_not_the_prior_that_all_share(model_dir: ModelDir, tmp_path: Path) -> None:
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), configured()).fit(known_task())
    user = recommender.adapt([("m1", 5.0), ("m2", 1.0)])
    assert not any(name.startswith("score.head.") for name in user.state)
    user.save(tmp_path / "user")
    assert (tmp_path / "user" / "score.safetensors").stat().st_size < 1000  # the prior's root alone would take more
    assert recommender.load_user(tmp_path / "user").score(["m7", "m8"]) == user.score(["m7", "m8"])


def test_no_step_from_the_posterior_is_the_posterior(model_dir: ModelDir) -> None:
    data = known_task()
    found = []
    for meta in ({"algorithm": "dkt"}, {"algorithm": "fomaml", "start": "posterior", "inner_steps": 0}):
        ready = prepared(model_dir("llama"), data, meta=meta)
        found.append(_meta_gradient(ready, configured(meta=meta), ready.fitted.meta, some_users(data)))
    learned = ["score.head.mean", "score.head.root", "score.head.log_noise", "model.layers.2.self_attn.q_proj.lora_B"]
    assert all(found[0].gradients[f"init/{name}"].abs().max() > 1e-5 for name in learned)
    for name, value in found[0].gradients.items():
        torch.testing.assert_close(found[1].gradients[name], value, rtol=1e-4, atol=1e-6)


def test_steps_from_the_posterior_lower_its_leave_one_out_error(model_dir: ModelDir) -> None:
    meta = {"algorithm": "fomaml", "start": "posterior", "inner_steps": 8, "inner_lr": 0.02}
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), configured(meta=meta)).prepare(known_task())
    scorer = recommender.scorer()
    supports = [one.support for one in requests(known_task(), 10)[:3]]
    adapted = scorer.adapt(supports)
    assert (adapted.losses[-1] < adapted.losses[0]).all()
    assert not adapted.diverged.any()
    posterior = recommender.scorer(rate_scale=0).bytes_per_user
    assert scorer.bytes_per_user > posterior == 0
    head = MetaRecommender.from_pretrained(model_dir("llama"), configured()).prepare(known_task()).scorer()
    assert scorer.bytes_per_user > head.bytes_per_user == 64


def test_a_folds_kernel_mean_knows_nothing_of_its_own_users(model_dir: ModelDir) -> None:
    data = known_task()
    user = data.parts["train"][0]
    rows = data.interactions.rows_of_user[user]
    rating = data.interactions.rating.copy()
    rating[rows] = rating[rows][::-1]  # the same ratings, so that standardizing them changes nothing
    other = replace(data, interactions=replace(data.interactions, rating=rating))
    name = data.interactions.users[user]
    one, two = (prepared(model_dir("llama"), some).crossed["kernel mean"] for some in (data, other))
    items = [np.arange(40)]
    empty = [data.evaluated("test")[0][0].support.head(0)]
    np.testing.assert_allclose(
        one.without(name).values(empty, items)[0], two.without(name).values(empty, items)[0], atol=1e-5
    )
    assert np.abs(one.term.values(empty, items)[0] - two.term.values(empty, items)[0]).max() > 1e-4


def test_a_meta_training_users_prior_is_the_one_that_has_not_seen_them(model_dir: ModelDir) -> None:
    """The shared parameters moved by the shift are where a fit without the user's fold starts, as a covariance."""
    data = known_task()
    ready = prepared(model_dir("llama"), data)
    names = [data.interactions.users[code] for code in data.parts["train"]]
    folds = ready.context.stack.out_of_fold.fold
    shift = ready.head_shift(names)
    start = ready.fitted.meta.init["score.head.root"]
    roots = start + shift["root"]
    without = data.parts["train"][[folds[name] != folds[names[0]] for name in names]]
    config = configured()
    alone = fit_weight_prior(
        replace(ready.context, users=without),
        {},
        {},
        ready.fitted.answer_model,
        config.collaborative.linear,  # type: ignore[arg-type]
        mean_term=True,
    ).weights
    expected = FEATURES_OF_LLAMA * alone.root @ alone.root.T
    torch.testing.assert_close(roots[0] @ roots[0].T, expected, atol=1e-3, rtol=1e-3)
    assert (roots[0] @ roots[0].T - start @ start.T).abs().max() > 0.01
    assert shift["root"][0].norm() < start.norm()  # turned, so that the two are near each other


def test_a_prior_is_fitted_once_for_the_same_ratings_and_features(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    data, fits = known_task(), []
    learn = weight_prior.learn_weights
    monkeypatch.setattr(weight_prior, "learn_weights", lambda *a, **k: fits.append(1) or learn(*a, **k))
    first, again = (prepared(model_dir("llama"), data) for _ in range(2))
    assert len(fits) == 1 + len(first.head_shifts)
    for name, value in first.fitted.meta.init.items():
        torch.testing.assert_close(again.fitted.meta.init[name], value, rtol=0, atol=0)
    prepared(model_dir("llama"), replace(data, parts={**data.parts, "train": data.parts["train"][1:]}))
    assert len(fits) == 2 * (1 + len(first.head_shifts))


def test_training_uses_the_shifted_prior(model_dir: ModelDir) -> None:
    data = known_task()
    ready = prepared(model_dir("llama"), data)
    one, other = (
        _meta_gradient(some, configured(), ready.fitted.meta, some_users(data))
        for some in (ready, replace(ready, head_shifts=()))
    )
    assert (one.loss - other.loss).abs().max() > 1e-4


def test_the_prior_explains_what_other_terms_leave(model_dir: ModelDir) -> None:
    """With an item mean in the score there is less left, and nothing of items of their own."""
    alone = prepared(model_dir("llama"), known_task()).fitted.meta.init
    beside = prepared(model_dir("llama"), known_task(), score=["item mean", "prompt", "adapter"]).fitted.meta.init
    assert not torch.equal(alone["score.head.mean"], beside["score.head.mean"])
    assert "score.kernel mean" not in beside


def test_a_posterior_without_an_adapter_to_read_is_refused(model_dir: ModelDir) -> None:
    config = configured(score=["item mean"], meta={"start": "posterior"})
    with pytest.raises(ConfigError, match="start 'posterior' reads"):
        MetaRecommender.from_pretrained(model_dir("llama"), config).fit(known_task())
    with pytest.raises(ConfigError, match="learn2learn"):
        configured(meta={"engine": "learn2learn", "start": "posterior"})


@pytest.mark.parametrize("method", ["posterior", "posterior + steps", "initialization + steps"])
def test_the_benchmarks_rows_take_as_many_steps_as_they_say_from_where_they_say(
    method: str, model_dir: ModelDir, tmp_path: Path
) -> None:
    training = {f"train.{name}": value for name, value in KERNEL["train"].items()}
    settings = {"backbone": str(model_dir("llama")), "adapter.layers": 2, **training}
    context = MethodContext(known_task(), tmp_path, settings=settings)
    found = {row.scorer.name: row.scorer for row in METHODS.get(method).rows(context)}
    start = method.removesuffix(" + steps")
    steps = {f"{start} + 1 step": 1, f"{start} + 3 steps": 3, f"{start} + 10 steps": 10}
    expected = {"posterior": 3, "posterior, no adaptation": 0} if method == "posterior" else steps
    assert {name: scorer.inner.steps for name, scorer in found.items()} == expected
    asked = requests(known_task(), 10)[:2]
    scores = [torch.cat(scorer.score(asked)) for scorer in found.values()]
    assert all((one - other).abs().max() > 1e-4 for one, other in pairwise(scores))
    heads = {"posterior": [64, 0], "initialization + steps": [0, 0, 0]}.get(method, [64, 64, 64])
    adapters = 0 if method == "posterior" else found[f"{start} + 1 step"].bytes_per_user - heads[0]
    assert [scorer.bytes_per_user for scorer in found.values()] == [head + adapters for head in heads]
    assert method == "posterior" or adapters > 64


def test_an_added_item_gets_what_its_text_says_and_nothing_of_its_own(model_dir: ModelDir) -> None:
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), configured()).prepare(known_task())
    catalog = recommender.fitted.catalog
    twin = {name: column[3] for name, column in catalog.fields.items()}
    longer = extend(recommender, recommender, [("twin", twin)])
    term, before = longer.fitted.terms["kernel mean"], recommender.fitted.terms["kernel mean"]
    assert isinstance(before, KernelMean)
    empty = [requests(known_task(), 0)[0].support]
    found = term.values(empty, [np.array([3, 40, 7])])[0]
    old = before.values(empty, [np.array([3, 7])])[0]
    np.testing.assert_allclose(found, [old[0], old[0] - before.effects[3], old[1]], atol=1e-5)
    assert abs(before.effects[3]) > 1e-4
