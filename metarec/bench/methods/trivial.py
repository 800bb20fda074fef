"""Methods that know no user: item means, popularity, constants."""

from __future__ import annotations

from metarec.bench.context import ENCODER, NO_SETTINGS, Method, one_row
from metarec.evaluate import BASELINE
from metarec.scorers.collaborative.trivial import Constant, ItemMean, Popularity, Random

TRIVIAL = {
    BASELINE: Method(
        one_row(lambda context: ItemMean(context.mean)),
        "trivial",
        "shrunk item means; what gains are measured from",
        settings=NO_SETTINGS,
    ),
    "random": Method(
        one_row(lambda context: Random(context.interactions.catalog, context.seed)),
        "trivial",
        "a hash of user and item",
        settings=NO_SETTINGS,
    ),
    "constant": Method(
        one_row(lambda context: Constant(context.interactions.catalog)),
        "trivial",
        "the same score for every item: what ties are worth",
        settings=NO_SETTINGS,
    ),
    "popularity": Method(
        one_row(lambda context: Popularity(context.mean)),
        "trivial",
        "how often an item was rated",
        settings=NO_SETTINGS,
    ),
    "item mean with text": Method(
        one_row(lambda context: ItemMean(context.prior, name="item mean with text")),
        "trivial",
        "item means shrunk towards a ridge regression on text",
        settings=ENCODER,
    ),
}
