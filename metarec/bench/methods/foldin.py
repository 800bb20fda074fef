"""Methods that fit a new user to a model of items in closed form: factors, neighbours, text, Gaussian process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from metarec.bench.context import ENCODER, LANGUAGE_MODEL, NO_SETTINGS, Method, MethodContext, MethodRow, one_row

if TYPE_CHECKING:
    from metarec.scorer import Scorer


def _als(context: MethodContext, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.foldin import fit_als

    return fit_als(context.interactions, context.users, context.prior, seed=context.seed, **options)


def _ease(context: MethodContext, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.foldin import fit_ease

    return fit_ease(context.interactions, context.users, context.prior, **options)


def _item_knn(context: MethodContext, *, text: bool = True, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.foldin import fit_item_knn

    neighbours = fit_item_knn(context.interactions, context.users, context.prior if text else context.mean, **options)
    return neighbours if text else replace(neighbours, name="item-kNN, no text")


def _user_knn(context: MethodContext, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.foldin import fit_user_knn

    return fit_user_knn(context.interactions, context.users, context.prior, **options)


def _text_ridge(context: MethodContext, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.text import fit_text_ridge

    return fit_text_ridge(context.prior, context.vectors, **options)


def _text_logistic(context: MethodContext, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.text import fit_text_logistic

    return fit_text_logistic(
        context.interactions, context.users, context.prior, context.vectors, threshold=context.threshold, **options
    )


def _two_tower(context: MethodContext) -> Scorer:
    from metarec.scorers.collaborative.text import fit_two_tower

    return fit_two_tower(context.vectors, threshold=context.threshold)


def _llm_two_tower(context: MethodContext) -> Sequence[MethodRow]:
    import numpy as np

    from metarec.scorers.collaborative.text import fit_two_tower

    answer_model = context.answer_model
    states = answer_model.states.cpu().numpy().astype(np.float64)
    return [MethodRow(fit_two_tower(states, threshold=context.threshold, name="two-tower cosine, LLM"))]


def _process(context: MethodContext, *, text: bool = True, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.gp_fitting import fit_process

    known = context.known if text else context.known_without_text
    process = fit_process(context.interactions, context.users, known, seed=context.seed, **options)
    return process if text else replace(process, name="GP, no text")


FOLD_IN = {
    "ALS": Method(
        one_row(_als, lambda als: als.factors.size), "fold-in", "matrix factorization of residuals", settings=ENCODER
    ),
    "EASE": Method(
        one_row(_ease, lambda ease: ease.weights.size), "fold-in", "a linear autoencoder of residuals", settings=ENCODER
    ),
    "item-kNN": Method(one_row(_item_knn), "fold-in", "similar items", settings=ENCODER),
    "item-kNN, no text": Method(
        one_row(_item_knn),
        "fold-in",
        "similar items, item means from ratings alone: rarely rated ones not smoothed by text",
        {"text": False},
        NO_SETTINGS,
    ),
    "user-kNN": Method(one_row(_user_knn), "fold-in", "similar users", settings=ENCODER),
    "text ridge": Method(one_row(_text_ridge), "fold-in", "ridge on text, prior as offset", settings=ENCODER),
    "text ridge, no prior": Method(
        one_row(_text_ridge), "fold-in", "ridge on text alone", {"offset": False, "penalty": 0.3}, ENCODER
    ),
    "text logistic": Method(
        one_row(_text_logistic), "fold-in", "logistic regression on text, prior as offset", settings=ENCODER
    ),
    "text logistic, no prior": Method(
        one_row(_text_logistic),
        "fold-in",
        "logistic regression on text alone",
        {"offset": False, "penalty": 0.3},
        ENCODER,
    ),
    "two-tower cosine": Method(one_row(_two_tower), "fold-in", "retrieval by MiniLM vectors", settings=ENCODER),
    "two-tower cosine, LLM": Method(
        _llm_two_tower, "fold-in", "retrieval by the language model's own states", settings=LANGUAGE_MODEL
    ),
    "GP": Method(
        one_row(_process, lambda gp: gp.loadings.size),
        "fold-in",
        "Gaussian process with learned item covariance, text and fields",
        settings=ENCODER,
    ),
    "GP, no text": Method(
        one_row(_process, lambda gp: gp.loadings.size),
        "fold-in",
        "that process without the text: learned item covariance and fields",
        {"text": False},
        NO_SETTINGS,
    ),
}
