"""Meta-learning the kernel of a Gaussian process: moved to where new users' rankings become better.

Expectation maximization explains ratings; what is wanted are rankings by people whom the process has never seen. So an
outer loop moves means, loadings and noise against the ranking loss of episodes, through the posterior given the
support, which is the inner loop in closed form. Every user is scored by a process that was fitted without them, all
processes moved by the same displacement: what is learned is what helps new users, not what these users said.

Knows nothing of language models, nor of where the processes come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from metarec.config import KernelConfig
from metarec.data.episodes import training_batch
from metarec.data.interactions import Codes, Interactions
from metarec.meta.losses import pairwise_logistic
from metarec.scorers.collaborative.gp import GaussianProcess
from metarec.scorers.collaborative.residuals import Floats

_SHOTS = (0, 2, 5, 10, 20)
_MAX_QUERY, _MIN_QUERY = 40, 6


@dataclass(frozen=True)
class KernelUpdate:
    """How far a process is moved.

    Args:
        mean: Added to the items' means, shape (items,).
        loadings: Added to their loadings, shape (items, loadings).
        log_noise: Added to the logarithm of their noise, shape (items,).
        selection_effect: Added to what having rated an item says, shape (loadings,).
    """

    mean: Floats
    loadings: Floats
    log_noise: Floats
    selection_effect: Floats

    def apply(self, process: GaussianProcess) -> GaussianProcess:
        """Returns the process, moved."""
        return replace(
            process,
            mean=process.mean + self.mean,
            loadings=process.loadings + self.loadings,
            noise=process.noise * np.exp(self.log_noise),
            selection_effect=process.selection_effect + self.selection_effect,
        )


def aligned(process: GaussianProcess, onto: GaussianProcess, factors: int) -> GaussianProcess:
    """Turns a process's learned factors to where another's are; its kernel, and so every score, stays what it was.

    Args:
        process: The process to turn.
        onto: A process with the same features, fitted on other users.
        factors: How many loadings, the first ones, are learned factors, whose order and sign mean nothing.

    Source: Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    turn, _ = orthogonal_procrustes(process.loadings[:, :factors], onto.loadings[:, :factors])

    def turned(loadings: Floats) -> Floats:
        return np.concatenate([loadings[..., :factors] @ turn, loadings[..., factors:]], -1)

    return replace(process, loadings=turned(process.loadings), centre=turned(process.centre))


def step_schedule(out_of_fold: Sequence[Codes], settings: KernelConfig) -> dict[str, Any]:
    """Returns how many users a step takes, how many steps, and at what rate, for `learn_kernel_update`.

    A quarter of the users that a process has not seen, within bounds. With more users a gradient says more, so steps
    become smaller and more numerous by the square root, and the way they go, which early stopping limits, is as long.

    Args:
        out_of_fold: As in `learn_kernel_update`.
        settings: Bounds, and steps and rate at the lower one.
    """
    users = int(np.clip(min(len(some) for some in out_of_fold) // 4, settings.min_users, settings.max_users))
    more = float(np.sqrt(users / settings.min_users))
    return {"users": users, "steps": round(settings.steps * more), "lr": settings.lr / more}


def learn_kernel_update(
    interactions: Interactions,
    processes: Sequence[GaussianProcess],
    out_of_fold: Sequence[Codes],
    *,
    threshold: float,
    steps: int,
    lr: float,
    users: int,
    sharpness: float = 2.0,
    seed: int = 0,
) -> KernelUpdate:
    """Learns one displacement for several processes, from the users that each of them has not seen.

    Args:
        interactions: The dataset.
        processes: Aligned processes.
        out_of_fold: For every process, meta-training users whom it has not seen; they take turns.
        threshold: Ratings from here on are likes.
        steps: Steps of Adam, the rate decaying to zero along a cosine; few, for early stopping regularizes.
        lr: Rate; for `selection_effect`, whose numbers are a hundred times larger, ten times it.
        users: Users per step.
        sharpness: Factor on differences of scores in the loss.
        seed: Seed of the episodes.

    Returns:
        The displacement; nothing moves where nobody has enough ratings for an episode.

    Source: the kernel is shared and the posterior is the adaptation as in Patacchiola et al. 2020, "Bayesian
    meta-learning for the few-shot setting via deep kernels", but the outer loss is a ranking's, on a query.
    """
    first = processes[0]
    start = {
        name: torch.zeros(getattr(first, name).shape) for name in ("mean", "loadings", "noise", "selection_effect")
    }
    moved = {name: value.requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(
        [{"params": [value], "lr": 10 * lr if name == "selection_effect" else lr} for name, value in moved.items()]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    fixed = [_tensors(process) for process in processes]
    longest = min(int(interactions.items_of_user[some].max(initial=0)) for some in out_of_fold)
    shots = [count for count in _SHOTS if count + _MIN_QUERY <= longest]
    for step in range(steps if shots else 0):
        turn = step % len(processes)
        batch = training_batch(
            interactions,
            out_of_fold[turn],
            batch_users=users,
            shots=shots,
            max_query=_MAX_QUERY,
            min_query=_MIN_QUERY,
            seed=seed,
            step=step,
        )
        support = np.stack([episode.support.items for episode in batch])
        rating = np.stack([episode.support.values for episode in batch])
        rating = (rating - processes[turn].mean_rating) / processes[turn].scale
        query = np.zeros((len(batch), _MAX_QUERY), np.int64)
        liked, real = np.zeros(query.shape, bool), np.zeros(query.shape, bool)
        for row, held_out in enumerate(episode.query for episode in batch):
            query[row, : len(held_out)], liked[row, : len(held_out)] = held_out.items, held_out.likes(threshold)
            real[row, : len(held_out)] = True
        scores = _scores(
            fixed[turn],
            moved,
            torch.from_numpy(support),
            torch.from_numpy(rating).float(),
            torch.from_numpy(query),
            processes[turn].selection_damping,
        )
        loss = pairwise_logistic(scores, torch.from_numpy(liked), torch.from_numpy(real), sharpness).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    learned = {name: value.detach().numpy().astype(np.float64) for name, value in moved.items()}
    return KernelUpdate(learned["mean"], learned["loadings"], learned["noise"], learned["selection_effect"])


def _tensors(process: GaussianProcess) -> dict[str, Tensor]:
    columns = {
        "mean": process.mean,
        "loadings": process.loadings,
        "noise": np.log(process.noise),
        "selection_effect": process.selection_effect,
        "centre": process.centre,
    }
    return {name: torch.from_numpy(np.asarray(column)).float() for name, column in columns.items()}


def _scores(
    process: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    support: Tensor,
    rating: Tensor,
    query: Tensor,
    selection_damping: float,
) -> Tensor:
    """`GaussianProcess.posterior_mean` of several users at once, as a function of how far the process is moved.

    Args:
        process: The process's numbers, noise as its logarithm.
        moved: What is added to them.
        support: Item codes, shape (users, K).
        rating: Standardized ratings, shape (users, K).
        query: Item codes, shape (users, candidates).
        selection_damping: See `GaussianProcess`.
    """

    def of(name: str, items: Tensor) -> Tensor:
        return process[name][items] + moved[name][items]

    mean, count = of("mean", query), support.shape[1]
    if count == 0:
        return mean
    rated = of("loadings", support)
    selection_effect = process["selection_effect"] + moved["selection_effect"]
    expected = selection_effect * (rated.mean(1) - process["centre"]) * count / (count + selection_damping)
    residual = rating - of("mean", support) - _times(rated, expected)
    covariance = rated @ rated.mT + torch.diag_embed(of("noise", support).exp())
    taste = expected + _times(rated.mT, torch.linalg.solve(covariance, residual.unsqueeze(-1)).squeeze(-1))
    return mean + _times(of("loadings", query), taste)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
