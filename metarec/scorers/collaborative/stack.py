"""Several methods' opinions as one: a weighted sum, its weights learned on users whom none of the methods has seen.

A Gaussian process with a meta-learned kernel, one over hardly any factors and a ridge regression on text err in
different ways. What each adds to the item prior enters with a weight that depends on how many ratings there are. None
keeps anybody's ratings.
Cross-fitting gives every meta-training user what they would get as a new one: for the weights, and for the outer loop.
Knows nothing of language models; text is vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from torch import Tensor

from metarec.config import CollaborativeConfig, StackConfig
from metarec.data.episodes import evaluation_episodes
from metarec.data.interactions import Codes, Flags, Interactions, Ratings, Values
from metarec.progress import progress
from metarec.scorer import Request, score_each
from metarec.scorers.collaborative.features import Features
from metarec.scorers.collaborative.gp import GaussianProcess, fit_process
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean
from metarec.scorers.collaborative.kernel_learning import aligned, learn_kernel_update, step_schedule
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.text import TextRidge, fit_text_ridge

Member = GaussianProcess | TextRidge
_SHOTS = (0, 5, 10, 20)
_MAX_QUERY, _MIN_QUERY = 50, 5


@dataclass(frozen=True)
class Stacked:
    """The item prior plus a weighted sum of what the members add to it.

    Args:
        prior: The item prior that the members' scores are taken around.
        members: The methods; the first is a Gaussian process. Their scores are in the prior's units.
        shots: Numbers of ratings that weights were learned for, ascending; between them weights are interpolated.
        weights: Shape (shots, members).
        name: How the method is called in tables.
    """

    prior: ItemPrior
    members: tuple[Member, ...]
    shots: tuple[int, ...]
    weights: Floats
    name: str = "stacked"

    @property
    def bytes_per_user(self) -> int:
        """What all members keep."""
        return sum(member.bytes_per_user for member in self.members)

    def posterior_mean(self, support: Ratings, candidates: Codes) -> Values:
        """Predicts ratings in the units of `ItemPrior`.

        Args:
            support: What is known of the user; may be empty.
            candidates: Item codes, shape (candidates,).

        Returns:
            Expected ratings, shape (candidates,).
        """
        base = self.prior.values(candidates)
        asked = [Request("", support, candidates)]
        total = base.astype(np.float64)
        for weight, member in zip(self._weights(len(support)), self.members, strict=True):
            total += weight * (member.score(asked)[0].numpy() - base)
        return total.astype(np.float32)

    def leave_one_out(self, support: Ratings) -> Values:
        """Predicts each rating of a support from the others, in the units of `ItemPrior`, shape (ratings,).

        By the Gaussian processes alone, with the weights of all: only theirs has a closed form.
        """
        base = self.prior.values(support.items)
        total = base.astype(np.float64)
        for weight, member in zip(self._weights(max(len(support) - 1, 0)), self.members, strict=True):
            if isinstance(member, GaussianProcess):
                total += weight * (member.leave_one_out(support) - base)
        return total.astype(np.float32)

    def _weights(self, ratings: int) -> Floats:
        at = np.log1p(np.asarray(self.shots, np.float64))
        return np.array([np.interp(np.log1p(ratings), at, column) for column in self.weights.T])

    def with_zero_mean(self) -> Stacked:
        """Returns the same methods around a mean of zero for every item."""
        silent = self.prior.with_zero_mean()
        members = tuple(
            member.with_zero_mean() if isinstance(member, GaussianProcess) else replace(member, prior=silent)
            for member in self.members
        )
        return replace(self, prior=silent, members=members)

    def extended(self, prior: ItemPrior) -> Stacked:
        """Returns the same methods with new items of which only the prior is known.

        Args:
            prior: The prior of all items, the new ones last.
        """
        return replace(self, prior=prior, members=tuple(_extended(member, prior) for member in self.members))

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(
            requests, len(self.prior.count), lambda asked: self.posterior_mean(asked.support, asked.candidates)
        )


def _extended(member: Member, prior: ItemPrior) -> Member:
    """Gives a method items that nobody rated: it adds nothing to their prior."""
    if isinstance(member, GaussianProcess):
        return member.extended(prior.values(np.arange(len(member.mean), len(prior.count))))
    silent = np.zeros((len(prior.count) - len(member.vectors), member.vectors.shape[1]))
    return replace(member, prior=prior, vectors=np.concatenate([member.vectors, silent]))


def item_mean_alone(prior: ItemPrior) -> Stacked:
    """Returns what says of every item what the prior says."""
    return Stacked(prior, (), (0,), np.ones((1, 0)))


def fit_members(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    features: Features,
    settings: CollaborativeConfig,
    seed: int,
) -> tuple[Member, ...]:
    """Fits the predictors that the settings name, a Gaussian process first.

    Where items are unrated there is no second process: learned factors do not reach such items.
    """
    if settings.members == "none":
        return ()
    process = fit_process(interactions, users, features, seed=seed, **settings.gp.model_dump())
    if settings.members == "gp":
        return (process,)
    ridge = fit_text_ridge(prior, features.text)
    if features.unrated is not None:
        return process, ridge
    stack = settings.stack
    narrow = {"factors": 1, "sweeps": stack.narrow_sweeps, "components": stack.narrow_components}
    single = fit_process(interactions, users, features, seed=seed, **{**settings.gp.model_dump(), **narrow})
    return process, single, ridge


@dataclass(frozen=True)
class Fold:
    """What was fitted without some of the meta-training users, and without some of the items.

    Args:
        prior: The item prior.
        stack: The collaborative predictors.
        hidden: Items whose ratings nothing here has seen, shape (items,); none where no item is cold.
    """

    prior: ItemPrior
    stack: Stacked
    hidden: Flags


@dataclass(frozen=True)
class OutOfFold:
    """Fits that each have not seen a fold of the meta-training users: what those users look like when new.

    Args:
        folds: The fits.
        fold: Which fold each meta-training user is in, by user id.
    """

    folds: tuple[Fold, ...]
    fold: Mapping[str, int]

    def without(self, user: str) -> Fold:
        """Returns the fit that has not seen a user."""
        return self.folds[self.fold[user]]

    def with_zero_mean(self) -> OutOfFold:
        """Returns the same fits around a mean of zero for every item."""
        silent = (Fold(fold.prior.with_zero_mean(), fold.stack.with_zero_mean(), fold.hidden) for fold in self.folds)
        return replace(self, folds=tuple(silent))


@dataclass(frozen=True)
class FittedStack:
    """What `fit_stack` fits: for new users, and for each meta-training user without them.

    Args:
        prior: Item means of all meta-training users, smoothed by text.
        stack: The collaborative predictors of all meta-training users.
        out_of_fold: The same without each fold of them.
    """

    prior: ItemPrior
    stack: Stacked
    out_of_fold: OutOfFold

    def with_zero_mean(self) -> FittedStack:
        """Returns the same fits around a mean of zero for every item."""
        return FittedStack(self.prior.with_zero_mean(), self.stack.with_zero_mean(), self.out_of_fold.with_zero_mean())


def fit_stack(
    interactions: Interactions,
    users: Codes,
    features: Features,
    settings: CollaborativeConfig,
    *,
    threshold: float,
    hide: float = 0.0,
    seed: int = 0,
) -> FittedStack:
    """Fits the predictors on all meta-training users and without each fold of them, and learns the weights.

    Args:
        interactions: The dataset.
        users: The meta-training users; nobody else's ratings are looked at.
        features: What is known of items.
        settings: Which predictors, and how they are fitted; with one there is nothing to weigh.
        threshold: Ratings from here on are likes.
        hide: Share of items that are hidden from every fold too, where the task asks about items that nobody rated.
        seed: Seed of the folds and of the fits.

    Source: Wolpert 1992, "Stacked generalization"; weights by the pairwise logistic loss of Rendle et al. 2009, eq. 4.
    """
    generator, folds = np.random.default_rng(seed), settings.stack.folds
    order = generator.permutation(len(users)) % folds
    rated = np.bincount(interactions.item, minlength=len(interactions.catalog)) > 0

    def fit(part: Interactions, some: Codes) -> tuple[ItemPrior, tuple[Member, ...]]:
        prior = features.smoothed(fit_item_mean(part, some), seed)
        return prior, fit_members(part, some, prior, features, settings, seed)

    parts: list[tuple[ItemPrior, tuple[Member, ...], Flags]] = []
    with progress("fitting collaborative predictors", folds + 1, after=2.0) as advance:
        for fold in range(folds):
            hidden = rated & (generator.random(len(rated)) < hide)
            seen = interactions.subset(~hidden[interactions.item]) if hide else interactions
            parts.append((*fit(seen, users[order != fold]), hidden))
            advance(fold + 1)
        prior, everybody = fit(interactions, users)
        advance(folds + 1)
    if settings.members == "stack" and not hide:
        # Where items are cold, the kernel update would move no item that is queried.
        out_of_fold = [users[order == fold] for fold in range(folds)]
        everybody, learned = _meta_learned(
            interactions, out_of_fold, everybody, [some for _, some, _ in parts], settings, threshold, seed
        )
        parts = [(own, some, hidden) for (own, _, hidden), some in zip(parts, learned, strict=True)]
    shots = _SHOTS if len(everybody) > 1 else (0,)
    weights = np.ones((1, len(everybody)))
    if len(everybody) > 1:
        examples = [
            _examples(interactions, users[order == fold], *parts[fold], settings.stack.pairs, threshold, seed)
            for fold in range(folds)
        ]
        # Without ratings predictors know only the items, and the first one alone knows these well.
        found = [
            _weights([pair for part in examples for pair in part[count]], len(everybody), settings.stack)
            for count in shots[1:]
        ]
        weights = np.stack([np.eye(len(everybody))[0], *found])
    fitted = [Fold(own, Stacked(own, some, shots, weights), hidden) for own, some, hidden in parts]
    fold_of = {interactions.users[code]: int(fold) for code, fold in zip(users, order, strict=True)}
    return FittedStack(prior, Stacked(prior, everybody, shots, weights), OutOfFold(tuple(fitted), fold_of))


def _meta_learned(
    interactions: Interactions,
    out_of_fold: Sequence[Codes],
    everybody: tuple[Member, ...],
    parts: Sequence[tuple[Member, ...]],
    settings: CollaborativeConfig,
    threshold: float,
    seed: int,
) -> tuple[tuple[Member, ...], list[tuple[Member, ...]]]:
    """Meta-learns the first member's kernel, for everybody, and for every fold from the users of the other ones.

    A fold then knows of its own users no more than what the other folds' processes passed on through the gradient.

    Args:
        interactions: The dataset.
        out_of_fold: Each fold's users, whom its own members have not seen.
        everybody: The members fitted on all users; the first is a Gaussian process.
        parts: The members of every fold.
        settings: How the kernel is learned.
        threshold: Ratings from here on are likes.
        seed: Seed of the episodes.
    """
    whole = everybody[0]
    assert isinstance(whole, GaussianProcess)
    factors = settings.gp.factors
    processes = [aligned(some[0], whole, factors) for some in parts if isinstance(some[0], GaussianProcess)]

    def moved(process: GaussianProcess, without: int | None) -> GaussianProcess:
        kept = [fold for fold in range(len(processes)) if fold != without]
        theirs = [out_of_fold[fold] for fold in kept]
        update = learn_kernel_update(
            interactions,
            [processes[fold] for fold in kept],
            theirs,
            threshold=threshold,
            seed=seed,
            sharpness=settings.kernel.sharpness,
            **step_schedule(theirs, settings.kernel),
        )
        return update.apply(process)

    learned = []
    with progress("meta-learning the kernel", len(parts) + 1, after=2.0) as advance:
        for fold, (process, some) in enumerate(zip(processes, parts, strict=True)):
            learned.append((moved(process, fold), *some[1:]))
            advance(fold + 1)
        first = moved(whole, None)
        advance(len(parts) + 1)
    return (first, *everybody[1:]), learned


def _examples(
    interactions: Interactions,
    users: Codes,
    prior: ItemPrior,
    members: tuple[Member, ...],
    hidden: Flags,
    pairs: int,
    threshold: float,
    seed: int,
) -> dict[int, list[tuple[Floats, Floats]]]:
    """Returns, by K, pairs of a liked and a disliked item of users that are new to the members.

    Each pair is the difference in the prior, shape (pairs,), and in what every member adds, shape (pairs, members).
    """
    cold = hidden if hidden.any() else None
    episodes, _ = evaluation_episodes(
        interactions,
        users,
        max_support=max(_SHOTS),
        max_query=_MAX_QUERY,
        min_query=_MIN_QUERY,
        order="random",
        seed=seed,
        support_from=None if cold is None else ~cold,
        query_from=cold,
        short_supports=True,
    )
    generator = np.random.default_rng(seed)
    found: dict[int, list[tuple[Floats, Floats]]] = {count: [] for count in _SHOTS[1:]}
    for episode in episodes:
        liked = episode.query.likes(threshold)
        if liked.all() or not liked.any():
            continue
        chosen = [generator.choice(np.flatnonzero(side), pairs) for side in (liked, ~liked)]
        base = prior.values(episode.query.items).astype(np.float64)
        for count in _SHOTS[1:]:
            asked = [Request("", episode.support.head(count).unlabelled(), episode.query.items)]
            contribution = np.stack([member.score(asked)[0].numpy() - base for member in members], 1)
            found[count].append((base[chosen[0]] - base[chosen[1]], contribution[chosen[0]] - contribution[chosen[1]]))
    return found


def _weights(pairs: Sequence[tuple[Floats, Floats]], members: int, settings: StackConfig) -> Floats:
    """Fits stacking weights with an L2 penalty toward their default."""
    start: Floats = np.array([settings.first_weight] + [settings.other_weight] * (members - 1))
    if not pairs:
        return start
    penalty = settings.weight_damping / len(pairs)
    offset = np.concatenate([base for base, _ in pairs])
    contribution = np.concatenate([one for _, one in pairs])

    def objective(weights: Floats) -> tuple[float, Floats]:
        margin = settings.sharpness * (offset + contribution @ weights)
        loss = np.logaddexp(0, -margin).mean() + penalty * ((weights - start) ** 2).sum()
        slope = -settings.sharpness * (contribution / (1 + np.exp(margin))[:, None]).mean(0) + 2 * penalty * (
            weights - start
        )
        return float(loss), slope

    found: Floats = np.asarray(minimize(objective, start, jac=True, method="L-BFGS-B").x, np.float64)
    return found
