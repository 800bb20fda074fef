"""Says what a person is believed to prefer, how surely, and which ratings would tell most about it.

All of it is in closed form, from the posterior of the person's weights in the score's Gaussian process: a category's
preference is a direction of the weights, and a rating takes a known part of their variance away, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metarec.data.interactions import Catalog, Codes, Flags, Ratings
from metarec.data.item_fields import MIN_ITEMS, choose_fields, tokens_in
from metarec.scorers.collaborative.gp import WeightPosterior
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.terms import CollaborativeTerm

if TYPE_CHECKING:
    from metarec.training.fitting import Fitted

# Categories that are described, items that they are described by, and items whose ratings are considered: the most
# rated ones of each, so that a large catalog takes no longer.
_MOST_CATEGORIES, _DESCRIBED, _MOST_ITEMS = 12, 20_000, 1000
# Share of the normal distribution between `low` and `high`, and how many standard deviations that is on each side.
INTERVAL = 0.8
_DEVIATIONS = 1.2815515655446004
# Chosen by validation users among 0, 1/2 and 1: benchmarks/first_items.py.
BY_RATERS = 0.5


@dataclass(frozen=True)
class Preference:
    """How much more a person is expected to like a category's items than others do, against the average item.

    Numbers are in units of the rating scale; between `low` and `high` lie 80% of what the model believes.

    Args:
        field: The field of items.
        category: One of its values.
        items: How many items carry it.
        mean: What is expected.
        low: Lower end of what is believed.
        high: Upper end.
        spread: Half the width of what is believed of somebody who has rated nothing.
    """

    field: str
    category: str
    items: int
    mean: float
    low: float
    high: float
    spread: float


@dataclass(frozen=True)
class Informative:
    """An item whose rating would tell much; `gain` is the share of the uncertainty that it takes away."""

    item: str
    title: str
    gain: float


@dataclass(frozen=True)
class Knowledge:
    """What is believed of a person.

    Args:
        known: Share of the variance of people's differences between items that the person's ratings explain, 0 to 1.
        preferences: One for each category, in a fixed order.
    """

    known: float
    preferences: tuple[Preference, ...]


@dataclass(frozen=True)
class _Directions:
    """The categories of a catalog, each with the direction of the weights that its preference is.

    Args:
        names: Field, category and number of items of each.
        loadings: Shape (categories, loadings).
    """

    names: tuple[tuple[str, str, int], ...]
    loadings: Floats


class PreferenceModel:
    """Reads preferences and informative items from a recommender's Gaussian process.

    Args:
        catalog: The items that the process was fitted on.
        term: The collaborative term; its stack begins with a process.

    Raises:
        ValueError: The stack has no process.
    """

    def __init__(self, catalog: Catalog, term: CollaborativeTerm) -> None:
        process, prior = term.process, term.stack.prior
        if process is None:
            raise ValueError("the stack has no Gaussian process")
        self._catalog = catalog
        self._term = term
        self._loadings, self._noise = process.loadings, process.noise
        self._unit = process.scale
        self._count = prior.count[: len(process.loadings)].astype(np.float64)
        codes = np.sort(np.argsort(-self._count, kind="stable")[:_DESCRIBED])
        share = self._count[codes] / max(self._count[codes].sum(), 1.0)
        centred = self._loadings[codes] - share @ self._loadings[codes]
        self._differences: Floats = (centred * share[:, None]).T @ centred
        self._directions = _directions(_some(catalog, codes), centred, share)

    @classmethod
    def of(cls, fitted: Fitted) -> PreferenceModel | None:
        """Returns the model of a recommender; None where its score has no Gaussian process."""
        term = fitted.terms.get("collaborative")
        if not isinstance(term, CollaborativeTerm) or term.process is None:
            return None
        return cls(fitted.catalog, term)

    def knowledge(self, support: Ratings) -> Knowledge:
        """Returns what is believed of a person.

        Args:
            support: What the person rated; may be empty.
        """
        posterior, along = self._posterior(support), self._directions.loadings
        means = along @ posterior.mean * self._unit
        reach = _DEVIATIONS * self._unit
        deviations = reach * np.sqrt(np.einsum("cl,lm,cm->c", along, posterior.covariance, along).clip(0))
        spreads = reach * np.sqrt((along**2).sum(1))
        preferences = tuple(
            Preference(field, category, items, float(mean), float(mean - width), float(mean + width), float(spread))
            for (field, category, items), mean, width, spread in zip(
                self._directions.names, means, deviations, spreads, strict=True
            )
        )
        return Knowledge(self._known(posterior.covariance), preferences)

    def _posterior(self, support: Ratings) -> WeightPosterior:
        """Returns what is believed of a person's weights; ratings of items that came later say nothing of them."""
        return self._term.weight_posterior(support.rows(np.flatnonzero(support.items < len(self._count))))

    def _known(self, covariance: Floats) -> float:
        everything = float(np.trace(self._differences))
        left = float((self._differences * covariance).sum())
        return float(np.clip(1 - left / everything, 0, 1)) if everything > 0 else 0.0

    def informative(
        self, support: Ratings, k: int, allowed: Flags, *, by_raters: float = BY_RATERS
    ) -> list[Informative]:
        """Chooses items whose ratings would take most of the uncertainty away.

        Each next item is chosen as if those before it were rated. The uncertainty is the variance of the person's
        differences between items, each weighted by its number of ratings.

        Args:
            support: What the person rated; their items are left out.
            k: How many; fewer come back where there are fewer.
            allowed: Which items may be chosen, shape (items,); those after the process's own are never.
            by_raters: Weighs an item's gain by this power of its number of raters, for few can rate what few know. 1 is
                the gain to expect of a question, 0 that of an answer.

        Source: greedy A-optimal design (Chaloner and Verdinelli 1995, "Bayesian experimental design", section 2.2),
        over differences instead of weights.
        """
        covariance = self._posterior(support).covariance
        codes = self._pool(support, allowed)
        weights = self._count[codes] ** by_raters
        everything = float((self._differences * covariance).sum())
        return [
            Informative(self._catalog.ids[code], self._catalog.title(int(code)), gain / everything)
            for code, gain in self._greedy(covariance, codes, weights, k)
        ]

    def _pool(self, support: Ratings, allowed: Flags) -> Codes:
        """Returns the most rated of the items that may be chosen."""
        open_ones = allowed[: len(self._count)] & (self._count > 0)
        open_ones[support.items[support.items < len(open_ones)]] = False
        codes = np.flatnonzero(open_ones)
        pool: Codes = codes[np.argsort(-self._count[codes], kind="stable")[:_MOST_ITEMS]]
        return pool

    def _greedy(self, covariance: Floats, codes: Codes, weights: Floats, k: int) -> Iterator[tuple[int, float]]:
        """Yields items and how far each lowers the variance of differences, given those before it."""
        left = np.ones(len(codes), bool)
        loadings, noise = self._loadings[codes], self._noise[codes]
        for _ in range(min(k, len(codes))):
            moved = loadings @ covariance  # covariance of each item's rating with the weights
            variance = (moved * loadings).sum(1) + noise
            gains = ((moved @ self._differences) * moved).sum(1) / variance
            best = int(np.argmax(np.where(left, gains * weights, -np.inf)))
            left[best] = False
            yield int(codes[best]), float(gains[best])
            covariance = covariance - np.outer(moved[best], moved[best]) / variance[best]


def _some(catalog: Catalog, codes: Codes) -> Catalog:
    """Returns a catalog of some items."""
    fields = {name: tuple(column[code] for code in codes) for name, column in catalog.fields.items()}
    return Catalog(tuple(catalog.ids[code] for code in codes), fields)


def _directions(catalog: Catalog, centred: Floats, share: Floats) -> _Directions:
    """Returns the most rated categories, and the mean loadings of each one's items around those of all items.

    Args:
        catalog: The items.
        centred: Their loadings around the mean, shape (items, loadings).
        share: Each item's share of ratings, shape (items,).
    """
    found: list[tuple[float, tuple[str, str, int], Floats]] = []
    for name, kind in choose_fields(catalog).read.items():
        if kind != "category":
            continue
        carriers: dict[str, list[int]] = {}
        for row, tokens in enumerate(tokens_in(catalog.fields[name])):
            for token in tokens:
                carriers.setdefault(token, []).append(row)
        for token, rows in carriers.items():
            weights = share[rows]
            if len(rows) >= MIN_ITEMS and weights.any():
                mean = weights @ centred[rows] / weights.sum()
                found.append((float(weights.sum()), (name, token, len(rows)), mean))
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    chosen = found[:_MOST_CATEGORIES]
    rows_of = [mean for _, _, mean in chosen]
    loadings = np.stack(rows_of) if rows_of else np.zeros((0, centred.shape[1]))
    return _Directions(tuple(name for _, name, _ in chosen), loadings)
