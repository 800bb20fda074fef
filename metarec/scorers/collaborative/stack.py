"""A stack of collaborative predictors: a weighted sum, its weights learned on users that no predictor was fitted on.

The members are a Gaussian process with a meta-learned kernel, one with a single factor, and a ridge regression on text
vectors; their errors differ. The weight of a member's difference to the item prior depends on the number of ratings in
the support. Each meta-training user is also predicted out of fold, by members that were fitted without that user, as a
new user would be: the weights and the outer loop are learned from these predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from metarec.config import CollaborativeConfig
from metarec.data.interactions import Codes, Flags, Interactions, Ratings, Values
from metarec.scorer import Request, score_each
from metarec.scorers.collaborative.features import Features
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.gp_fitting import fit_processes
from metarec.scorers.collaborative.item_mean import ItemPrior, fit_item_mean
from metarec.scorers.collaborative.kernel_learning import aligned, learn_kernel_update, step_schedule
from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.collaborative.stack_weights import Fit, Member, fit_weights
from metarec.scorers.collaborative.text import fit_text_ridge
from metarec.system.progress import progress
from metarec.system.threads import map_each


@dataclass(frozen=True)
class Stacked:
    """The item prior plus a weighted sum of what the members add to it.

    Args:
        prior: The item prior that the members' scores are compared with.
        members: The predictors; the first is a Gaussian process. Their scores are in the prior's units.
        shots: Support sizes that weights were learned for, ascending; between them weights are interpolated.
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
        """The sum over all members."""
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
        requests = [Request("", support, candidates)]
        total = base.astype(np.float64)
        for weight, member in zip(self._weights(len(support)), self.members, strict=True):
            total += weight * (member.score(requests)[0].numpy() - base)
        return total.astype(np.float32)

    def leave_one_out(self, support: Ratings) -> Values:
        """Predicts each rating of a support from the others, in the units of `ItemPrior`, shape (ratings,).

        Only the Gaussian processes take part, with their weights: the other members have no such prediction in closed
        form.
        """
        base = self.prior.values(support.items)
        total = base.astype(np.float64)
        for weight, member in zip(self._weights(max(len(support) - 1, 0)), self.members, strict=True):
            if isinstance(member, GaussianProcess):
                total += weight * (member.leave_one_out(support) - base)
        return total.astype(np.float32)

    def without_each(self, support: Ratings, candidates: Codes) -> tuple[Floats, Floats]:
        """Predicts ratings without each rating of a support in turn, and with all.

        Args:
            support: What is known of the user, one rating at least.
            candidates: Item codes, shape (candidates,).

        Returns:
            What `leave_one_out` says of the ratings that are left, shape (ratings + 1, ratings), and `posterior_mean`
            of the candidates, shape (ratings + 1, candidates). The last rows are with all ratings.
        """
        count = len(support)
        base, prior = self.prior.values(support.items), self.prior.values(candidates)
        fewer, least, every = (self._weights(max(ratings, 0)) for ratings in (count - 1, count - 2, count))
        rated = np.tile(base.astype(np.float64), (count + 1, 1))
        asked = np.tile(prior.astype(np.float64), (count + 1, 1))
        for place, member in enumerate(self.members):
            if isinstance(member, GaussianProcess):
                left, found = member.without_each(support, candidates)
                rated += np.append(np.full(count, least[place]), fewer[place])[:, None] * (left - base)
            else:
                found = member.without_each(support, candidates)
            asked += np.append(np.full(count, fewer[place]), every[place])[:, None] * (found - prior)
        return rated, asked

    def _weights(self, ratings: int) -> Floats:
        """Interpolates every member's weight along the logarithm of the number of ratings, shape (members,)."""
        at = np.log1p(np.asarray(self.shots, np.float64))
        return np.array([np.interp(np.log1p(ratings), at, column) for column in self.weights.T])

    def with_zero_mean(self) -> Stacked:
        """Returns the stack with every item's mean set to 0."""
        prior = self.prior.with_zero_mean()
        members = tuple(
            member.with_zero_mean() if isinstance(member, GaussianProcess) else replace(member, prior=prior)
            for member in self.members
        )
        return replace(self, prior=prior, members=members)

    def extended(self, prior: ItemPrior) -> Stacked:
        """Returns the stack with new items, whose predictions equal their prior.

        Args:
            prior: The prior of all items, the new ones last.
        """
        return replace(self, prior=prior, members=tuple(_extended(member, prior) for member in self.members))

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_each(
            requests, len(self.prior.count), lambda request: self.posterior_mean(request.support, request.candidates)
        )


def _extended(member: Member, prior: ItemPrior) -> Member:
    """Returns a member with new items, for which it predicts their prior."""
    if isinstance(member, GaussianProcess):
        return member.extended(prior.values(np.arange(len(member.mean), len(prior.count))))
    zeros = np.zeros((len(prior.count) - len(member.vectors), member.vectors.shape[1]))
    return replace(member, prior=prior, vectors=np.concatenate([member.vectors, zeros]))


def item_mean_alone(prior: ItemPrior) -> Stacked:
    """Returns a stack without members, which equals the item prior."""
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

    Where unrated items are queried there is no second process: its learned factor is 0 for such items.
    """
    if settings.members == "none":
        return ()
    if settings.members == "linear":
        how = settings.linear.model_dump()
        unrated = features.unrated is not None
        return (fit_linear_kernel(interactions, users, features.linear, name="linear kernel", unrated=unrated, **how),)
    options = [settings.gp.model_dump()]
    if settings.members == "stack" and features.unrated is None:
        stack = settings.stack
        narrow = {"factors": 1, "sweeps": stack.narrow_sweeps, "components": stack.narrow_components}
        options.append({**options[0], **narrow})
    processes = fit_processes(interactions, users, features, *options, seed=seed)
    ridge = [fit_text_ridge(prior, features.text)] if settings.members == "stack" else []
    return *processes, *ridge


@dataclass(frozen=True)
class Fold:
    """Fits without one fold of the meta-training users, and without some of the items.

    Args:
        prior: The item prior.
        stack: The collaborative predictors.
        hidden: Items that supports do not hold and queries hold alone, shape (items,): their ratings were left out
            too, or they are all that users are asked about; none where neither is so.
    """

    prior: ItemPrior
    stack: Stacked
    hidden: Flags


@dataclass(frozen=True)
class OutOfFold:
    """Fits without each fold of the meta-training users, which predict these users as new ones.

    Args:
        folds: The fits.
        fold: Which fold each meta-training user is in, by user id.
    """

    folds: tuple[Fold, ...]
    fold: Mapping[str, int]

    def without(self, user: str) -> Fold:
        """Returns the fit without a user's fold."""
        return self.folds[self.fold[user]]

    def with_zero_mean(self) -> OutOfFold:
        """Returns the fits with every item's mean set to 0."""
        folds = (Fold(fold.prior.with_zero_mean(), fold.stack.with_zero_mean(), fold.hidden) for fold in self.folds)
        return replace(self, folds=tuple(folds))


@dataclass(frozen=True)
class FittedStack:
    """What `fit_stack` fits: a stack for new users, and one without each fold of the meta-training users.

    Args:
        prior: Item means from all meta-training users, smoothed by text.
        stack: The predictors fitted on all meta-training users.
        out_of_fold: The predictors fitted without each fold of them.
    """

    prior: ItemPrior
    stack: Stacked
    out_of_fold: OutOfFold

    def with_zero_mean(self) -> FittedStack:
        """Returns the fits with every item's mean set to 0."""
        return FittedStack(self.prior.with_zero_mean(), self.stack.with_zero_mean(), self.out_of_fold.with_zero_mean())


def fold_order(users: int, folds: int, seed: int) -> Codes:
    """Returns the fold of each of the meta-training users, shape (users,)."""
    return np.random.default_rng(seed).permutation(users) % folds


def fit_stack(
    interactions: Interactions,
    users: Codes,
    features: Features,
    settings: CollaborativeConfig,
    *,
    threshold: float,
    hide: float = 0.0,
    query_items: Flags | None = None,
    seed: int = 0,
) -> FittedStack:
    """Fits the predictors on all meta-training users and without each fold of them, and learns the weights.

    Args:
        interactions: The dataset.
        users: The meta-training users; only their ratings are used.
        features: The features of all items.
        settings: Which predictors, and how they are fitted; a single one has weight 1.
        threshold: Ratings from here on are likes.
        hide: Share of items whose ratings are left out of every fold too, where unrated items are queried.
        query_items: Items that queries hold, while supports hold the others, shape (items,); None where both hold all
            items.
        seed: Seed of the folds and of the fits.

    Source: Wolpert 1992, "Stacked generalization"; weights by the pairwise logistic loss of Rendle et al. 2009, eq. 4.
    """
    generator, folds = np.random.default_rng(seed), settings.stack.folds
    order = fold_order(len(users), folds, seed)
    generator.permutation(len(users))  # what `fold_order` drew, so that the items hidden from folds stay the same
    out_of_fold = [users[order == fold] for fold in range(folds)]
    rated = np.bincount(interactions.item, minlength=len(interactions.catalog)) > 0

    def fit(part: Interactions, some: Codes, hidden: Flags) -> Fit:
        prior = features.smoothed(fit_item_mean(part, some), seed)
        return Fit(prior, fit_members(part, some, prior, features, settings, seed), hidden)

    jobs = [(interactions, users, np.zeros(len(rated), bool))]
    for fold in range(folds):
        hidden = rated & (generator.random(len(rated)) < hide)
        kept = interactions.subset(~hidden[interactions.item]) if hide else interactions
        jobs.append((kept, users[order != fold], hidden))
    with progress("fitting collaborative predictors", folds + 1, after=2.0) as advance:
        whole, *parts = map_each(lambda job: fit(*job), jobs, torch.get_num_threads(), advance)
    if settings.members == "stack" and not hide:
        # The kernel update changes rated items alone, so it has no effect where unrated items are queried.
        whole, parts = _with_kernel_update(interactions, out_of_fold, whole, parts, settings, threshold, seed)
    if query_items is not None:
        parts = [replace(part, hidden=query_items) for part in parts]
    shots, weights = fit_weights(interactions, out_of_fold, whole, parts, settings.stack, threshold, seed)
    fitted = [Fold(part.prior, Stacked(part.prior, part.members, shots, weights), part.hidden) for part in parts]
    fold_of = {interactions.users[code]: int(fold) for code, fold in zip(users, order, strict=True)}
    stack = Stacked(whole.prior, whole.members, shots, weights)
    return FittedStack(whole.prior, stack, OutOfFold(tuple(fitted), fold_of))


def _with_kernel_update(
    interactions: Interactions,
    out_of_fold: Sequence[Codes],
    whole: Fit,
    parts: Sequence[Fit],
    settings: CollaborativeConfig,
    threshold: float,
    seed: int,
) -> tuple[Fit, list[Fit]]:
    """Meta-learns the first member's kernel: for the whole fit from all folds, for each fold from the other folds.

    The users of a fold then influence its kernel only through the fits of the other folds, which include them.

    Args:
        interactions: The dataset.
        out_of_fold: Each fold's users, on whom its own members were not fitted.
        whole: The members fitted on all users; the first is a Gaussian process.
        parts: The members of every fold.
        settings: How the kernel is learned.
        threshold: Ratings from here on are likes.
        seed: Seed of the episodes.
    """
    process = whole.members[0]
    assert isinstance(process, GaussianProcess)
    firsts = [part.members[0] for part in parts]
    processes = [aligned(first, process, settings.gp.factors) for first in firsts if isinstance(first, GaussianProcess)]

    def updated(fit: Fit, first: GaussianProcess, without: int | None) -> Fit:
        kept = [fold for fold in range(len(processes)) if fold != without]
        users = [out_of_fold[fold] for fold in kept]
        update = learn_kernel_update(
            interactions,
            [processes[fold] for fold in kept],
            users,
            step_schedule(users, settings.kernel),
            threshold=threshold,
            seed=seed,
            sharpness=settings.kernel.sharpness,
        )
        return replace(fit, members=(update.apply(first), *fit.members[1:]))

    jobs = [(whole, process, None), *zip(parts, processes, range(len(parts)), strict=True)]
    with progress("meta-learning the kernel", len(jobs), after=2.0) as advance:
        whole, *learned = map_each(lambda job: updated(*job), jobs, torch.get_num_threads(), advance)
    return whole, learned
