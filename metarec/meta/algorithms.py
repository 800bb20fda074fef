"""Meta-learning algorithms as pure functions over an `AdapterState` and a loss.

An inner loop adapts every user's own copy of the initialization to the user's support loss; an outer gradient moves
the initialization and the inner rates. A loss maps a state with a leading user dimension to one number per user, so
the gradient of their sum holds each user's own gradient and no loop over users is needed.

The exact meta-gradient needs no unrolled graph: the adjoint is computed backwards over the stored trajectory, with one
Hessian-vector product per step. One step's graph is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.meta.inner_loop import INNER, Adapted, Loss, MetaState, Solve, adapt, finite_users, per_user
from metarec.system.tensors import AdapterState, expand_users


@dataclass(frozen=True)
class MetaGradient:
    """The gradient of one outer step.

    Args:
        loss: Query loss of each user after adapting, shape (users,).
        gradients: Gradient of the mean over users that did not diverge, by flat meta-parameter name.
        diverged: Users whose inner loop or query loss diverged; they are left out of the gradient, shape (users,).
    """

    loss: Tensor
    gradients: AdapterState
    diverged: Tensor


Algorithm = Callable[[MetaState, Loss, Loss, int, int], MetaGradient]


def maml(
    meta: MetaState,
    support_loss: Loss,
    query_loss: Loss,
    users: int,
    steps: int,
    *,
    second_order: bool = True,
    step_weights: Sequence[float] | None = None,
) -> MetaGradient:
    """Returns the exact meta-gradient of the query loss after adapting, by Hessian-vector products.

    With a = rate, g_t = grad of the support loss at state_t and u the gradient of the query loss at the last state,
    each backward step is ``u <- u - H_t (a * u)``; the gradient of the log rates is the sum of ``-a * g_t * u``.

    Args:
        meta: The meta-parameters.
        support_loss: What the inner loop minimizes.
        query_loss: What the outer loop minimizes.
        users: Number of users in the losses.
        steps: Inner steps.
        second_order: False leaves the Hessian out (first-order MAML); settings of the inner loop, `INNER`, keep their
            gradient ``-a * d g_t / d setting * u``, as the inner rates keep theirs.
        step_weights: Weight of the query loss after 0, 1, ..., `steps` steps; None uses the last step alone.

    Source: Finn, Abbeel and Levine 2017, algorithm 1; the adjoint is reverse differentiation of their eq. 1 by hand.
    """
    adapted = adapt(meta, support_loss, users, steps, keep_path=True)
    weights = [*[0.0] * steps, 1.0] if step_weights is None else list(step_weights)
    return _backpropagate(meta, adapted, support_loss, query_loss, second_order, weights)


def _backpropagate(
    meta: MetaState,
    adapted: Adapted,
    support_loss: Loss,
    query_loss: Loss,
    second_order: bool,
    weights: Sequence[float],
) -> MetaGradient:
    """Computes the meta-gradient backwards over the path of an inner loop."""
    steps = len(adapted.path)
    last, shared = _split(adapted.state, meta)
    states = [*(state for state, _ in adapted.path), last]
    queries = {step: _query(query_loss, states[step], shared) for step in range(steps + 1) if weights[step]}
    loss = torch.stack([weights[step] * query.loss for step, query in queries.items()]).sum(0)
    kept = ~adapted.diverged & loss.isfinite()
    for query in queries.values():
        kept = kept & finite_users({**query.adapted, **query.shared})
    adjoint = {name: torch.zeros_like(value) for name, value in last.items()}
    outer = {name: torch.zeros_like(value) for name, value in shared.items()}
    rates = {name: torch.zeros_like(value) for name, value in meta.log_rate.items()}
    inner = {name for name in shared if name.startswith(INNER)}
    for step in range(steps, -1, -1):
        if step in queries:
            adjoint = _sum(adjoint, _mean_over(kept, queries[step].adapted), weights[step])
            outer = _sum(outer, _mean_over(kept, queries[step].shared), weights[step])
        if step == 0:
            break
        before, gradients = adapted.path[step - 1]
        scaled = {name: meta.rate(name, step - 1).detach() * value for name, value in adjoint.items()}
        for name, gradient in gradients.items():
            change = torch.where(per_user(kept, gradient), scaled[name] * gradient, 0.0)
            at = min(step - 1, len(rates[name]) - 1)
            rates[name][at] -= change.sum_to_size(1, *rates[name][at].shape).view(rates[name][at].shape)
        if second_order or inner:
            product, product_shared = _hessian_product(support_loss, before, shared, scaled)
            if second_order:
                adjoint = _sum(adjoint, product, -1.0)
            else:
                product_shared = {name: value for name, value in product_shared.items() if name in inner}
            outer = _sum(outer, product_shared, -1.0)
    found = {f"init/{name}": value.sum(0) for name, value in {**outer, **adjoint}.items()}
    found |= {f"log_rate/{name}": value for name, value in rates.items()}
    return MetaGradient(loss, {name: found[name].detach() for name in meta.tensors()}, ~kept)


@dataclass(frozen=True)
class _Query:
    loss: Tensor
    adapted: AdapterState
    shared: AdapterState


def _query(query_loss: Loss, adapted: AdapterState, shared: AdapterState) -> _Query:
    """Returns the query loss and its gradients, each user's own."""
    leaves = {name: value.detach().requires_grad_() for name, value in {**shared, **adapted}.items()}
    with torch.enable_grad():
        loss = query_loss(leaves)
        gradients = _gradients(loss.sum(), leaves)
    split = [{name: gradients[name] for name in part} for part in (adapted, shared)]
    return _Query(loss.detach(), *split)


def _split(state: AdapterState, meta: MetaState) -> tuple[AdapterState, AdapterState]:
    """Divides a state into the tensors that the inner loop adapts and those shared by all users."""
    adapted = {name: state[name] for name in meta.log_rate}
    return adapted, {name: value for name, value in state.items() if name not in meta.log_rate}


def _mean_over(kept: Tensor, gradients: AdapterState) -> AdapterState:
    """Divides gradients by the number of kept users; those of the other users become zero."""
    count = kept.sum().clamp(min=1)
    return {
        name: torch.where(per_user(kept, value), value / count, torch.zeros_like(value))
        for name, value in gradients.items()
    }


def _hessian_product(
    loss: Loss, adapted: AdapterState, shared: AdapterState, direction: AdapterState
) -> tuple[AdapterState, AdapterState]:
    """Returns products of `direction` with the support loss's second derivatives: adapted-adapted, adapted-shared.

    Products that are not finite become zero; their users diverged and are left out of the gradient.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in {**shared, **adapted}.items()}
    with torch.enable_grad():
        inner = [leaves[name] for name in adapted]
        gradients = torch.autograd.grad(loss(leaves).sum(), inner, create_graph=True)
        total = sum((gradient * direction[name]).sum() for name, gradient in zip(adapted, gradients, strict=True))
        # The second derivative of a support loss that is linear in the adapted tensors is 0.
        products = _gradients(total, leaves) if isinstance(total, Tensor) and total.requires_grad else {}
    clean = {name: value.nan_to_num(0.0, 0.0, 0.0) for name, value in products.items()}
    return {name: clean[name] for name in adapted if clean}, {name: clean[name] for name in shared if clean}


def _gradients(total: Tensor, leaves: AdapterState) -> AdapterState:
    """Returns the gradient of every leaf, zero where the total does not depend on it."""
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient.detach()
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _sum(left: AdapterState, right: AdapterState, factor: float = 1.0) -> AdapterState:
    """Returns ``left + factor * right``, for the names of `left`."""
    return {name: value + factor * right[name] if name in right else value for name, value in left.items()}


def fomaml(meta: MetaState, support_loss: Loss, query_loss: Loss, users: int, steps: int) -> MetaGradient:
    """Returns the gradient of first-order MAML with learned inner rates.

    Source: Finn, Abbeel and Levine 2017, section 5.2: the query gradient at the adapted parameters, taken as the
    gradient at the initialization.
    """
    return maml(meta, support_loss, query_loss, users, steps, second_order=False)


def maml_plus_plus(meta: MetaState, support_loss: Loss, query_loss: Loss, users: int, steps: int) -> MetaGradient:
    """Returns the gradient of MAML++: the query loss after every step, later steps with larger weights.

    Rates are learned per tensor and per step.

    Source: Antoniou et al. 2019, eq. 4. Their weights shift to the last step during training; here they stay in the
    proportion 1 : 2 : ... : `steps`.
    """
    total = steps * (steps + 1) / 2
    weights = [step / total for step in range(steps + 1)] if steps else [1.0]
    return maml(meta, support_loss, query_loss, users, steps, step_weights=weights)


def imaml(
    meta: MetaState,
    support_loss: Loss,
    query_loss: Loss,
    users: int,
    steps: int,
    *,
    prox_strength: float = 1.0,
    solver_steps: int = 5,
) -> MetaGradient:
    """Returns the gradient of iMAML: through the minimum of ``support_loss + prox_strength / 2 * |state - init|^2``.

    ``(H + prox_strength)^-1`` is applied by conjugate gradient, for all users at once. The minimum does not depend on
    the inner rates, so their gradient is zero.

    Args:
        meta: The meta-parameters.
        support_loss: What the inner loop minimizes, beside the proximal term.
        query_loss: What the outer loop minimizes.
        users: Number of users in the losses.
        steps: Inner steps; the gradient is exact where they reach the minimum.
        prox_strength: Strength of the proximal term.
        solver_steps: Conjugate gradient steps.

    Source: Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients", eq. 6 and algorithm 2.
    """
    adapted = adapt(meta, support_loss, users, steps, prox_strength=prox_strength)
    last, shared = _split(adapted.state, meta)
    query = _query(query_loss, last, shared)
    kept = ~adapted.diverged & query.loss.isfinite()

    def operator(direction: AdapterState) -> AdapterState:
        product, _ = _hessian_product(support_loss, last, shared, direction)
        return _sum({name: prox_strength * value for name, value in direction.items()}, product)

    target = _mean_over(kept, query.adapted)
    solution = _conjugate_gradient(operator, target, solver_steps)
    _, product_shared = _hessian_product(support_loss, last, shared, solution)
    outer = _mean_over(kept, query.shared)
    found = {f"init/{name}": prox_strength * value.sum(0) for name, value in solution.items()}
    found |= {f"init/{name}": value.sum(0) for name, value in _sum(outer, product_shared, -1.0).items()}
    found |= {f"log_rate/{name}": torch.zeros_like(value) for name, value in meta.log_rate.items()}
    return MetaGradient(query.loss, {name: found[name].detach() for name in meta.tensors()}, ~kept)


def _conjugate_gradient(
    operator: Callable[[AdapterState], AdapterState], target: AdapterState, steps: int
) -> AdapterState:
    """Solves ``operator(x) = target`` separately for every user (Hestenes and Stiefel 1952)."""

    def dot(left: AdapterState, right: AdapterState) -> Tensor:
        return torch.stack([(left[name] * right[name]).reshape(len(left[name]), -1).sum(1) for name in left]).sum(0)

    def move(start: AdapterState, factor: Tensor, direction: AdapterState) -> AdapterState:
        return {name: value + per_user(factor, value) * direction[name] for name, value in start.items()}

    solution = {name: torch.zeros_like(value) for name, value in target.items()}
    residual = direction = target
    norm = dot(residual, residual)
    for _ in range(steps):
        image = operator(direction)
        curvature = dot(direction, image)
        # The step is 0 for users whose residual is 0 and in directions without positive curvature.
        size = torch.where(curvature > 0, norm / curvature.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
        solution = move(solution, size, direction)
        residual = move(residual, -size, image)
        new_norm = dot(residual, residual)
        turn = torch.where(norm > 0, new_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
        direction = move(residual, turn, direction)
        norm = new_norm
    return solution


def reptile(meta: MetaState, support_loss: Loss, query_loss: Loss, users: int, steps: int) -> MetaGradient:
    """Returns the gradient of Reptile: the initialization minus the adapted parameters.

    As in the paper the inner loop uses all of a user's data: support and query loss are averaged. Tensors that the
    inner loop does not adapt, and the inner rates, follow the first-order gradient of the same loss.

    Source: Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithm 1; the difference
    is divided by the inner rate (their section 3), so that one outer rate serves every tensor.
    """

    def joint(state: AdapterState) -> Tensor:
        return (support_loss(state) + query_loss(state)) / 2

    adapted = adapt(meta, joint, users, steps, keep_path=True)
    first_order = _backpropagate(meta, adapted, joint, joint, False, [*[0.0] * steps, 1.0])
    kept = ~first_order.diverged
    gradients = dict(first_order.gradients)
    for name in meta.log_rate if steps else ():
        change = (meta.init[name] - adapted.state[name]) * per_user(kept, adapted.state[name])
        rate = torch.stack([meta.rate(name, step) for step in range(steps)]).sum(0)
        gradients[f"init/{name}"] = (change.sum(0) / (kept.sum().clamp(min=1) * rate)).detach()
    return MetaGradient(first_order.loss, gradients, first_order.diverged)


def closed_form(meta: MetaState, solve: Solve, query_loss: Loss, users: int) -> MetaGradient:
    """Returns the exact meta-gradient for an inner problem solved in closed form, such as a ridge regression head.

    Args:
        meta: The meta-parameters; there are no inner rates.
        solve: Maps the state shared by all users to every user's adapted state; differentiable.
        query_loss: What the outer loop minimizes.
        users: Number of users in the losses.

    Source: Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers", algorithm 1.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in expand_users(meta.init, users).items()}
    with torch.enable_grad():
        loss = query_loss(solve(leaves))
        gradients = _gradients(loss.sum(), leaves)
    kept = loss.detach().isfinite() & finite_users(gradients)
    found = {f"init/{name}": value.sum(0) for name, value in _mean_over(kept, gradients).items()}
    return MetaGradient(loss.detach(), found, ~kept)
