"""Meta-learning of a Gaussian process's kernel, by the ranking loss of users that the process was not fitted on.

Expectation maximization fits the ratings of known users; the goal is to rank items for new ones. An outer loop
therefore changes means, loadings and noise by gradient steps on the ranking loss of episodes. The inner loop is the
posterior given the support, in closed form. Every user is scored by a process that was fitted without them, and all
processes get the same update, so that it fits new users and not the ratings of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from metarec.config import KernelConfig
from metarec.data.episodes import Episode, training_batch
from metarec.data.interactions import Codes, Interactions
from metarec.meta.losses import pairwise_logistic
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.residuals import Floats
from metarec.system.tensors import pad_rows
from metarec.system.threads import one_thread

_SHOTS = (0, 2, 5, 10, 20)
_MAX_QUERY, _MIN_QUERY = 40, 6
# The parameters of a process that have a row for every item.
_OF_ITEMS = ("mean", "loadings", "noise")


@dataclass(frozen=True)
class KernelUpdate:
    """What is added to the parameters of a process.

    Args:
        mean: Added to the items' means, shape (items,).
        loadings: Added to their loadings, shape (items, loadings).
        log_noise: Added to the logarithm of their noise, shape (items,).
        selection_effect: Added to the selection effect, shape (loadings,).
    """

    mean: Floats
    loadings: Floats
    log_noise: Floats
    selection_effect: Floats

    def apply(self, process: GaussianProcess) -> GaussianProcess:
        """Returns the process with the update added."""
        return replace(
            process,
            mean=process.mean + self.mean,
            loadings=process.loadings + self.loadings,
            noise=process.noise * np.exp(self.log_noise),
            selection_effect=process.selection_effect + self.selection_effect,
        )


@one_thread()
def aligned(process: GaussianProcess, onto: GaussianProcess, factors: int) -> GaussianProcess:
    """Rotates a process's learned factors towards another's; its kernel, and so every score, stays the same.

    Args:
        process: The process to rotate.
        onto: A process with the same features, fitted on other users.
        factors: How many loadings, the first ones, are learned factors, whose order and sign are arbitrary.

    Source: Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    from scipy.linalg import orthogonal_procrustes  # here: a saved recommender serves without it

    rotation, _ = orthogonal_procrustes(process.loadings[:, :factors], onto.loadings[:, :factors])

    def rotated(loadings: Floats) -> Floats:
        return np.concatenate([loadings[..., :factors] @ rotation, loadings[..., factors:]], -1)

    return replace(process, loadings=rotated(process.loadings), centre=rotated(process.centre))


@dataclass(frozen=True)
class StepSchedule:
    """How an update is learned by gradient steps.

    Args:
        users: Users per step.
        steps: Steps of Adam, the rate decaying to zero along a cosine; few, for early stopping regularizes.
        lr: Rate; `selection_effect`, whose numbers are a hundred times larger, gets ten times it.
    """

    users: int
    steps: int
    lr: float


def step_schedule(out_of_fold: Sequence[Codes], settings: KernelConfig) -> StepSchedule:
    """Returns how many users a step takes, how many steps there are, and their rate.

    A step takes a quarter of the smallest fold's users, between the limits of the settings. With more users a gradient
    is less noisy: steps become more numerous by the square root of the number and smaller by the same factor, so that
    the total length of all steps, which early stopping limits, stays the same.

    Args:
        out_of_fold: As in `learn_kernel_update`.
        settings: The limits, and steps and rate at the lower one.
    """
    users = int(np.clip(min(len(some) for some in out_of_fold) // 4, settings.min_users, settings.max_users))
    more = float(np.sqrt(users / settings.min_users))
    return StepSchedule(users, steps=round(settings.steps * more), lr=settings.lr / more)


@one_thread()
def learn_kernel_update(
    interactions: Interactions,
    processes: Sequence[GaussianProcess],
    out_of_fold: Sequence[Codes],
    schedule: StepSchedule,
    *,
    threshold: float,
    sharpness: float = 2.0,
    seed: int = 0,
) -> KernelUpdate:
    """Learns one update for several processes, each from meta-training users that it was not fitted on.

    Time and memory grow with the items that these users rated; nothing is learned of the others, and nothing is added.

    Args:
        interactions: The dataset.
        processes: Aligned processes.
        out_of_fold: For every process, the meta-training users that it was not fitted on; the processes take turns.
        schedule: Users, number and rate of the steps.
        threshold: Ratings from here on are likes.
        sharpness: Factor on differences of scores in the loss.
        seed: Seed of the episodes.

    Returns:
        The update; zero where no user has enough ratings for an episode.

    Source: as in Patacchiola et al. 2020, "Bayesian meta-learning for the few-shot setting via deep kernels", the
    kernel is shared and the posterior is the adaptation; here the outer loss is a ranking loss on a query.
    """
    rated = np.unique(interactions.item[np.isin(interactions.user, np.concatenate(out_of_fold))])
    update = _zero_update(processes[0], len(rated))
    optimizer = torch.optim.Adam(
        [
            {"params": [value], "lr": 10 * schedule.lr if name == "selection_effect" else schedule.lr}
            for name, value in update.items()
        ],
        fused=True,
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(schedule.steps, 1))
    fixed = [_tensors(process, rated) for process in processes]
    longest = min(int(interactions.items_of_user[some].max(initial=0)) for some in out_of_fold)
    shots = [count for count in _SHOTS if count + _MIN_QUERY <= longest]
    for step in range(schedule.steps if shots else 0):
        turn = step % len(processes)
        episodes = training_batch(
            interactions,
            out_of_fold[turn],
            batch_users=schedule.users,
            shots=shots,
            max_query=_MAX_QUERY,
            min_query=_MIN_QUERY,
            seed=seed,
            step=step,
        )
        loss = _query_loss(processes[turn], fixed[turn], update, episodes, rated, threshold, sharpness)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    learned = {name: value.detach().numpy().astype(np.float64) for name, value in update.items()}
    of_items = {name: np.zeros(getattr(processes[0], name).shape) for name in _OF_ITEMS}
    for name, values in of_items.items():
        values[rated] = learned[name]
    return KernelUpdate(of_items["mean"], of_items["loadings"], of_items["noise"], learned["selection_effect"])


def _zero_update(process: GaussianProcess, items: int) -> dict[str, Tensor]:
    """Returns the tensors that are learned, all zero and with gradients; those of items have so many rows."""
    shapes = {name: (items, *getattr(process, name).shape[1:]) for name in _OF_ITEMS}
    shapes["selection_effect"] = process.selection_effect.shape
    return {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}


def _query_loss(
    process: GaussianProcess,
    fixed: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    episodes: Sequence[Episode],
    rated: Codes,
    threshold: float,
    sharpness: float,
) -> Tensor:
    """Returns the mean ranking loss of some episodes, whose supports are of one length; see `learn_kernel_update`."""
    support = np.searchsorted(rated, np.stack([episode.support.items for episode in episodes]))
    rating = np.stack([episode.support.values for episode in episodes])
    rating = (rating - process.mean_rating) / process.scale
    queries = [episode.query for episode in episodes]
    scores = _scores(
        fixed,
        update,
        torch.from_numpy(support),
        torch.from_numpy(rating).float(),
        pad_rows([np.searchsorted(rated, query.items) for query in queries], np.int64, _MAX_QUERY),
        process.selection_damping,
    )
    liked = pad_rows([query.likes(threshold) for query in queries], bool, _MAX_QUERY)
    real = pad_rows([np.ones(len(query), bool) for query in queries], bool, _MAX_QUERY)
    return pairwise_logistic(scores, liked, real, sharpness).mean()


def _tensors(process: GaussianProcess, items: Codes) -> dict[str, Tensor]:
    """Returns a process's parameters as tensors, of some items alone, noise as its logarithm."""
    columns = {
        "mean": process.mean[items],
        "loadings": process.loadings[items],
        "noise": np.log(process.noise[items]),
        "selection_effect": process.selection_effect,
        "centre": process.centre,
    }
    return {name: torch.from_numpy(np.asarray(column)).float() for name, column in columns.items()}


def _scores(
    process: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    support: Tensor,
    rating: Tensor,
    query: Tensor,
    selection_damping: float,
) -> Tensor:
    """Returns `GaussianProcess.posterior_mean` of several users, differentiable in the update.

    Args:
        process: The process's parameters, noise as its logarithm.
        update: The update, added to them.
        support: Item codes, shape (users, K).
        rating: Standardized ratings, shape (users, K).
        query: Item codes, shape (users, candidates).
        selection_damping: See `GaussianProcess`.
    """
    count = support.shape[1]
    # One look-up for support and query: its gradient is a tensor of all items.
    items, sizes = torch.cat([support, query], 1), (count, query.shape[1])
    mean: Tensor
    mean_of_rated, mean = (process["mean"][items] + update["mean"][items]).split(sizes, 1)
    if count == 0:
        return mean
    # An embedding's gradient takes half the time of an index's.
    rows = embedding(items, process["loadings"]) + embedding(items, update["loadings"])
    rated, asked = rows.split(sizes, 1)
    log_noise = process["noise"][support] + update["noise"][support]
    selection_effect = process["selection_effect"] + update["selection_effect"]
    expected = selection_effect * (rated.mean(1) - process["centre"]) * count / (count + selection_damping)
    residual = rating - mean_of_rated - _times(rated, expected)
    covariance = rated @ rated.mT + torch.diag_embed(log_noise.exp())
    weights = expected + _times(rated.mT, torch.linalg.solve(covariance, residual.unsqueeze(-1)).squeeze(-1))
    return mean + _times(asked, weights)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
