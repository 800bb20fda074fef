"""Methods that know no user: item means, popularity, constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metarec.bench.context import ENCODER, NO_SETTINGS, Method, MethodContext, one_row
from metarec.evaluation.metrics import BASELINE

if TYPE_CHECKING:
    from metarec.scorer import Scorer


def _item_mean(context: MethodContext) -> Scorer:
    from metarec.scorers.collaborative.trivial import ItemMean

    return ItemMean(context.mean)


def _item_mean_with_text(context: MethodContext) -> Scorer:
    from metarec.scorers.collaborative.trivial import ItemMean

    return ItemMean(context.prior, name="item mean with text")


def _random(context: MethodContext) -> Scorer:
    from metarec.scorers.collaborative.trivial import Random

    return Random(context.interactions.catalog, context.seed)


def _constant(context: MethodContext) -> Scorer:
    from metarec.scorers.collaborative.trivial import Constant

    return Constant(context.interactions.catalog)


def _popularity(context: MethodContext) -> Scorer:
    from metarec.scorers.collaborative.trivial import Popularity

    return Popularity(context.mean)


TRIVIAL = {
    BASELINE: Method(
        one_row(_item_mean), "trivial", "shrunk item means; what gains are measured from", settings=NO_SETTINGS
    ),
    "random": Method(one_row(_random), "trivial", "a hash of user and item", settings=NO_SETTINGS),
    "constant": Method(
        one_row(_constant), "trivial", "the same score for every item: what ties are worth", settings=NO_SETTINGS
    ),
    "popularity": Method(one_row(_popularity), "trivial", "how often an item was rated", settings=NO_SETTINGS),
    "item mean with text": Method(
        one_row(_item_mean_with_text),
        "trivial",
        "item means shrunk towards a ridge regression on text",
        settings=ENCODER,
    ),
}
