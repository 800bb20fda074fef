"""Networks over item features, without a language model: MeLU, amortised learners, a graph network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from metarec.bench.context import ENCODER, Method, MethodContext, one_row

if TYPE_CHECKING:
    from metarec.scorer import Scorer
    from metarec.scorers.collaborative.network_forms import Form
    from metarec.scorers.collaborative.networks import Network


def _fitted(fit: Callable[..., Scorer], context: MethodContext, **options: Any) -> Scorer:
    return fit(
        context.interactions,
        context.users,
        context.prior,
        context.features,
        validation=context.validation,
        threshold=context.threshold,
        seed=context.seed,
        **options,
    )


def _network(form: Form, context: MethodContext, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.networks import fit_network

    return _fitted(partial(fit_network, form), context, side=context.side, **options)


def _graph(context: MethodContext, **options: Any) -> Scorer:
    from metarec.scorers.collaborative.graph_network import fit_graph_network

    return _fitted(fit_graph_network, context, **options)


def _size(network: Network) -> int:
    return sum(value.numel() for value in network.meta.tensors().values())


NETWORKS = {
    "MeLU": Method(
        one_row(partial(_network, "melu"), _size), "meta", "decision layers adapted by MAML", settings=ENCODER
    ),
    "neural process": Method(
        one_row(partial(_network, "neural process"), _size),
        "meta",
        "the support is read in one pass",
        {"weight_decay": 1.0},
        ENCODER,
    ),
    "set transformer": Method(
        one_row(partial(_network, "set transformer"), _size),
        "meta",
        "ratings attend to each other, candidates to the ratings",
        {"weight_decay": 1.0},
        ENCODER,
    ),
    "graph network": Method(
        one_row(_graph, lambda network: network.layers[0].size),
        "meta",
        "LightGCN over likes, friends and texts (needs torch-geometric)",
        settings=ENCODER,
    ),
    "hypernetwork": Method(
        one_row(partial(_network, "hypernetwork"), _size),
        "meta",
        "the support's encoding emits a rank-1 change of the output layer",
        {"weight_decay": 1.0},
        ENCODER,
    ),
}
