"""Adapter kinds: what one user's adapter consists of, and how the model uses it.

One file per kind. Another package adds one by an entry point in the group ``metarec.adapter_kinds``, a script by
``ADAPTER_KINDS.register`` or by naming ``module:attribute`` as `Placement.kind`. Importing this module does not import
torch; asking the registry for a kind does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from metarec import registries
from metarec.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Where the adapters sit and of what kind they are.

    Args:
        layers: How many of the topmost blocks carry adapters.
        targets: Names of the linear layers within a block, such as ``q_proj``; a prefix has none.
        rank: Rank of every low-rank adapter.
        alpha: See `AdapterSpec`.
        active_tokens: Only the last so many tokens of the prompt carry the adapter (activated LoRA, Greenewald et
            al. 2025); None means all tokens (plain LoRA).
        kind: A name in `ADAPTER_KINDS`, or ``module:attribute``.
        rslora: See `AdapterSpec`.
        virtual_tokens: Length of a prefix.
    """

    layers: int
    targets: tuple[str, ...]
    rank: int
    alpha: float
    active_tokens: int | None
    kind: str = "lora"
    rslora: bool = False
    virtual_tokens: int = 0


@dataclass(frozen=True)
class BlockShape:
    """What adapters need to know of one transformer block.

    Args:
        path: Module path of the block.
        linears: Module path to (out features, in features) of every linear layer in it.
        key_width: Width of all its key heads together; None where attention takes no virtual tokens.
        kv_heads: How many key heads there are; None where attention takes no virtual tokens.
        transposed: Whether its linear layers keep their weights as (in, out), like GPT-2's.
        hidden: Width of the residual stream; None where it is not known.
    """

    path: str
    linears: Mapping[str, tuple[int, int]]
    key_width: int | None
    kv_heads: int | None = None
    transposed: bool = False
    hidden: int | None = None


@dataclass(frozen=True)
class AdapterSpec:
    """Which adapters there are and of what size.

    Args:
        shapes: For ``lora`` and ``bias``, module path to (out features, in features); for ``prefix``, block path to
            (virtual tokens, width of keys).
        kind: A name in `ADAPTER_KINDS`, or ``module:attribute``.
        rank: Inner dimension of every low-rank update.
        alpha: A low-rank update is scaled by ``alpha / rank``.
        rslora: Scales by ``alpha / sqrt(rank)`` instead, so that higher ranks learn as fast.
        peft_facts: What else of the model PEFT's configuration has to say; nothing that an adapter has to fit.
    """

    shapes: Mapping[str, tuple[int, int]]
    kind: str = "lora"
    rank: int = 1
    alpha: float = 1.0
    rslora: bool = False
    peft_facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def implementation(self) -> AdapterKind:
        """What the kind's name stands for."""
        return ADAPTER_KINDS.get(self.kind)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of one user's adapter."""
        return self.implementation.tensor_shapes(self)


class AdapterKind(Protocol):
    """One kind of adapter. A class that inherits from this one needs to define only the first four members.

    States are dicts of tensors by name, see `metarec.system.tensors`. All computation must be differentiable twice.

    Attributes:
        inner_rate: Where inner learning rates start when the settings name none.
    """

    inner_rate: float

    def tensor_shapes(self, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
        """Returns names and shapes of the tensors of one user's adapter, without a user dimension."""
        ...

    def fresh(self, spec: AdapterSpec, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns a new adapter, without a user dimension; one that changes nothing, where the kind has such."""
        ...

    def update(
        self, spec: AdapterSpec, state: Mapping[str, Tensor], name: str, inputs: Tensor, output: Tensor
    ) -> Tensor:
        """Returns what the users' adapters add to the output of a linear layer.

        Args:
            spec: The adapters' sizes; `name` is one of its `shapes`.
            state: Adapters with a user dimension.
            name: Module path of the layer.
            inputs: What the layer reads, shape (users, ..., in).
            output: What the frozen layer returns, shape (users, ..., out).

        Returns:
            Broadcastable to `output`.
        """
        ...

    def prepared(self, adapters: Adapters, model: Any) -> Adapters:
        """Returns the adapters with what every read of a batch shares; most kinds have nothing of the sort.

        Args:
            adapters: Every user's adapters.
            model: The frozen model's blocks, a `metarec.lm.families.BlockModel`.
        """
        return adapters

    def virtual_tokens(self, state: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor] | None:
        """Returns keys and values that attention sees in front of all tokens of a block, or None.

        Args:
            state: Adapters with a user dimension.
            path: Module path of the block, one of `AdapterSpec.shapes`.

        Returns:
            Keys and values, each of shape (users, virtual tokens, width of keys).
        """
        return None

    def targets(self, asked: tuple[str, ...] | None, linears: Iterable[str]) -> tuple[str, ...] | None:
        """Returns the names of the linear layers that carry adapters.

        Args:
            asked: Names from the settings; None asks for the usual ones.
            linears: Names of the linear layers that a block has.

        Returns:
            None where the kind has no usual names among `linears`.
        """
        return usual_targets(linears) if asked is None else asked

    def virtual_length(self, asked: int) -> int:
        """Returns how many virtual tokens an adapter has, given how many the settings ask for."""
        return 0

    def check(self, model: str, blocks: Sequence[BlockShape], placement: Placement) -> None:
        """Refuses a placement that a model has no place for.

        Raises:
            ConfigError: The model cannot carry these adapters.
        """
        return

    def spec(self, blocks: Sequence[BlockShape], placement: Placement) -> AdapterSpec:
        """Returns the adapters' sizes, given the blocks that carry them."""
        facts = {"fan_in_fan_out": True} if any(block.transposed for block in blocks) else {}
        return AdapterSpec(targeted(blocks, placement.targets), placement.kind, peft_facts=facts)

    def peft_config(self, spec: AdapterSpec) -> dict[str, Any] | None:
        """Returns what PEFT's configuration says of the adapters' sizes; None where PEFT has no such kind."""
        return None

    def to_peft(self, spec: AdapterSpec, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns one user's tensors under the names and in the form of PEFT."""
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def from_peft(self, spec: AdapterSpec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns one user's tensors from what `to_peft` returned."""
        return weights


@dataclass(frozen=True)
class Adapters:
    """Every user's adapters as a block sees them: tensors with a user dimension, and their sizes."""

    state: Mapping[str, Tensor]
    spec: AdapterSpec


# The query, value and output projections of attention, as architectures call them.
_USUAL_TARGETS = (
    ("q_proj", "v_proj", "o_proj"),
    ("q_proj", "v_proj", "out_proj"),
    ("query", "value", "dense"),
    ("q_lin", "v_lin", "out_lin"),
    ("c_attn", "c_proj"),
    ("qkv_proj", "o_proj"),
    ("query_key_value", "dense"),
    ("Wqkv", "Wo"),
    ("q", "v", "o"),
)


def usual_targets(linears: Iterable[str]) -> tuple[str, ...] | None:
    """Returns the names of the query, value and output projections, or None where a block calls them otherwise."""
    names = set(linears)
    return next((usual for usual in _USUAL_TARGETS if names.issuperset(usual)), None)


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Says whether a module path ends with one of the target names."""
    return any(module == target or module.endswith("." + target) for target in targets)


def targeted(blocks: Sequence[BlockShape], targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Returns module path to (out, in) of the linear layers that the targets name."""
    return {name: shape for block in blocks for name, shape in block.linears.items() if is_target(name, targets)}


ADAPTER_KINDS: Registry[AdapterKind] = registries.ADAPTER_KINDS
