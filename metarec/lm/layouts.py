"""Takes a transformers model apart into blocks, following a description of how its family's models are built.

A family is a `Layout`: names of modules, and rules where blocks of one model differ. What a block has that its layout
does not name is noticed, and the model is then run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from metarec.lm.blocks import Attention, Linear, Mlp, Norm, Norms, Places, TransformerBlock
from metarec.lm.families import NotExactError
from metarec.lm.rounded import RoundedLinear, RoundedWeight

# Maps a model's configuration and a block's number to a setting of the block.
Rule = Callable[[Any, int], Any]


def embedded(base: Any, tokens: Tensor, start: int) -> Tensor:
    """Returns what the input embeddings say of tokens alone."""
    states: Tensor = base.get_input_embeddings()(tokens)
    return states


def with_positions(base: Any, tokens: Tensor, start: int) -> Tensor:
    """Returns what an encoder's embeddings say of tokens from the first position on."""
    assert start == 0, "an encoder's prompts share no prefix"
    states: Tensor = base.embeddings(input_ids=tokens)
    return states


def no_places(base: Any, positions: Tensor) -> list[Places]:
    """Returns nothing for every block: positions are in the embeddings."""
    return [None] * base.config.num_hidden_layers


def rotary(base: Any, positions: Tensor, *kinds: str) -> list[Places]:
    """Returns the same rotary positions for every block.

    Args:
        base: The model without its head.
        positions: Shape (rows, tokens).
        *kinds: What else the model's rotary module asks for.
    """
    # The angles come in the type of the first argument; bfloat16 would blur them.
    like = torch.zeros(1, dtype=torch.promote_types(base.dtype, torch.float32), device=positions.device)
    cos, sin = base.rotary_emb(like, positions, *kinds)
    return [(cos[:, None], sin[:, None])] * base.config.num_hidden_layers


def rotary_by_type(base: Any, positions: Tensor) -> list[Places]:
    """Returns rotary positions of one kind for blocks that see all tokens, of another for those that see a window."""
    found = {kind: rotary(base, positions, kind)[0] for kind in sorted(set(base.config.layer_types))}
    return [found[kind] for kind in base.config.layer_types]


def sliding_window(config: Any, index: int) -> int | None:
    """Returns how far a block of a decoder looks back: all blocks alike, or as its type says."""
    types = getattr(config, "layer_types", None)
    kind = "sliding_attention" if types is None else types[index]
    if kind not in ("sliding_attention", "full_attention"):
        raise NotExactError(f"its block {index} has attention of the kind '{kind}'")
    window: int | None = config.sliding_window if kind == "sliding_attention" else None
    return window


def nothing(config: Any, index: int) -> None:
    """Returns None for every block."""
    return


@dataclass(frozen=True)
class Layout:
    """Says how the models of a family are built.

    Names are module paths: of norms, linear layers and the activation below a block; of the others below the model
    without its head.

    Attributes:
        model_types: What transformers configurations call the family's models.
        kinds: What they are read as: ``causal``, ``masked``, ``encoder``.
        attention: The block's attention.
        qkv: Queries, keys and values; or one layer that computes all three.
        out: Attention's output projection.
        mlp: Up and down projection; or gate, up and down projection.
        activation: The MLP's activation.
        attention_norms: Norms of attention: before, after, and over the sum.
        mlp_norms: The same of the MLP.
        layers: The list of blocks.
        final_norm: The norm after the last block; None without one.
        interleaved: Whether one layer's queries, keys and values follow each other head by head.
        gate_with_up: Whether the first name in `mlp` computes the gate and what it opens.
        qk_norms: Norms of queries and keys.
        norm_offset: What RMSNorms add to their weight.
        cap: Rule of `Attention.cap`.
        window: Rule of `Attention.window`.
        parallel: Rule of `TransformerBlock.parallel`.
        embed: The model without its head, tokens (rows, tokens) and the first one's position to states.
        places: The model without its head and positions (rows, tokens) to what each block knows of them.
        head: Model and last states to what the vocabulary head of a masked LM multiplies.
        takes_prefix: See `BlockModel.takes_prefix`.
    """

    model_types: tuple[str, ...]
    kinds: tuple[str, ...]
    attention: str
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, ...]
    activation: str
    attention_norms: tuple[str | None, str | None, str | None]
    mlp_norms: tuple[str | None, str | None, str | None]
    layers: str = "layers"
    final_norm: str | None = "norm"
    interleaved: bool = False
    gate_with_up: bool = False
    qk_norms: tuple[str, str] | None = None
    norm_offset: float = 0.0
    cap: Rule = nothing
    window: Rule = nothing
    parallel: Callable[[Any, int], bool] = lambda config, index: False
    embed: Callable[[Any, Tensor, int], Tensor] = embedded
    places: Callable[[Any, Tensor], list[Places]] = rotary
    head: Callable[[Any, Tensor], Tensor] | None = None
    takes_prefix: bool = True

    def take_apart(self, model: Any, kind: str) -> TransformerModel | None:
        """See `BackboneFamily.take_apart`."""
        if model.config.model_type not in self.model_types:
            return None
        if kind not in self.kinds:
            raise NotExactError(
                f"it is read as {kind}; of its family, only {' and '.join(self.kinds)} models are cached"
            )
        base = model.base_model
        path = next(name for name, module in model.named_modules() if module is base)
        below = f"{path}.{self.layers}" if path else self.layers
        layers = range(len(base.get_submodule(self.layers)))
        norm = _Parts(base, path).norm(self.final_norm, self.norm_offset)
        return TransformerModel(
            layout=self,
            model=model,
            kind=kind,
            blocks=tuple(self._block(model, kind, f"{below}.{index}", index) for index in layers),
            final_norm=norm,
            limit=_limit(model.config),
        )

    def _block(self, model: Any, kind: str, path: str, index: int) -> TransformerBlock:
        layer, config = model.get_submodule(path), model.config
        attention = layer.get_submodule(self.attention)
        if getattr(attention, "is_causal", kind == "causal") != (kind == "causal"):
            raise NotExactError(f"its attention is {'causal' if attention.is_causal else 'not causal'}, read as {kind}")
        parts = _Parts(layer, path)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        q, k, v = self._queries_keys_values(parts, config, head_dim)
        gate, up, down = self._mlp(parts)
        q_norm, k_norm = (parts.norm(name, self.norm_offset) for name in self.qk_norms or (None, None))
        block = TransformerBlock(
            path=path,
            attention=Attention(
                q=q,
                k=k,
                v=v,
                out=parts.linear(self.out),
                head_dim=head_dim,
                scale=getattr(attention, "scaling", head_dim**-0.5),
                q_norm=q_norm,
                k_norm=k_norm,
                cap=self.cap(config, index),
                window=self.window(config, index),
            ),
            mlp=Mlp(gate, up, down, attrgetter(self.activation)(layer)),
            attention_norms=Norms(*(parts.norm(name, self.norm_offset) for name in self.attention_norms)),
            mlp_norms=Norms(*(parts.norm(name, self.norm_offset) for name in self.mlp_norms)),
            parallel=self.parallel(config, index),
        )
        unknown = {name.rpartition(".")[0] for name, _ in layer.named_parameters()} - parts.used
        if unknown:
            raise NotExactError(f"its blocks have parts that the family does not know ({', '.join(sorted(unknown))})")
        return block

    def _queries_keys_values(self, parts: _Parts, config: Any, head_dim: int) -> tuple[Linear, Linear, Linear]:
        if len(self.qkv) == 3:
            q, k, v = (parts.linear(name) for name in self.qkv)
            return q, k, v
        whole, heads = parts.linear(self.qkv[0]), config.num_attention_heads
        if self.interleaved:
            rows = torch.arange(3 * heads * head_dim, device=whole.weight.device).view(heads, 3, head_dim)
            q, k, v = (whole.part(rows[:, which].flatten()) for which in range(3))
            return q, k, v
        first = heads * head_dim
        second = (first + whole.weight.shape[0]) // 2
        return whole.part(slice(0, first)), whole.part(slice(first, second)), whole.part(slice(second, None))

    def _mlp(self, parts: _Parts) -> tuple[Linear | None, Linear, Linear]:
        first, *others = (parts.linear(name) for name in self.mlp)
        if self.gate_with_up:
            half = first.weight.shape[0] // 2
            return first.part(slice(0, half)), first.part(slice(half, 2 * half)), others[0]
        return (None, first, others[0]) if len(others) == 1 else (first, others[0], others[1])


@dataclass(frozen=True)
class TransformerModel:
    """A transformers model taken apart; see `metarec.lm.families.BlockModel`.

    Args:
        layout: How it is built.
        model: The transformers model.
        kind: What it is read as.
        blocks: From bottom to top.
        final_norm: The norm after the last block, or None.
        limit: See `BlockModel.limit`.
    """

    layout: Layout
    model: Any
    kind: str
    blocks: tuple[TransformerBlock, ...]
    final_norm: Norm | None
    limit: int | None

    @property
    def causal(self) -> bool:
        """See `BlockModel.causal`."""
        return self.kind == "causal"

    @property
    def takes_prefix(self) -> bool:
        """See `BlockModel.takes_prefix`."""
        return self.causal and self.layout.takes_prefix

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """See `BlockModel.embed`."""
        return self.layout.embed(self.model.base_model, tokens, start)

    def places(self, positions: Tensor) -> Sequence[Places]:
        """See `BlockModel.places`."""
        return self.layout.places(self.model.base_model, positions)

    def final(self, hidden: Tensor) -> Tensor:
        """See `BlockModel.final`."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.kind == "masked" and self.layout.head is not None:
            hidden = self.layout.head(self.model, hidden.to(self.model.dtype))
        return hidden


class _Parts:
    """A module's frozen parts by name, and which of them were asked for."""

    def __init__(self, module: Any, path: str) -> None:
        self.module = module
        self.path = path
        self.used: set[str] = set()

    def _part(self, name: str) -> Any:
        self.used.add(name)
        try:
            return self.module.get_submodule(name)
        except AttributeError:
            raise NotExactError(f"its blocks have no '{name}'") from None

    def linear(self, name: str) -> Linear:
        """Returns a linear layer; GPT-2's Conv1D keeps its weight as (in, out)."""
        module = self._part(name)
        weight: Tensor | RoundedWeight
        if isinstance(module, RoundedLinear):
            weight = module.rounded
        else:
            weight = module.weight.detach() if isinstance(module, torch.nn.Linear) else module.weight.detach().t()
        return Linear(f"{self.path}.{name}", weight, None if module.bias is None else module.bias.detach())

    def norm(self, name: str | None, offset: float) -> Norm | None:
        """Returns a norm; None where there is none, or one that does nothing."""
        module = None if name is None else self._part(name)
        if module is None or isinstance(module, torch.nn.Identity):
            return None
        weight = module.weight.detach()
        if isinstance(module, torch.nn.LayerNorm):
            return Norm(weight, None if module.bias is None else module.bias.detach(), module.eps, centred=True)
        if not type(module).__name__.endswith("RMSNorm"):
            raise NotExactError(f"its norm '{name}' is a {type(module).__name__}")
        if offset:
            weight = offset + weight.to(torch.promote_types(weight.dtype, torch.float32))
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return Norm(weight, None, eps)


def _limit(config: Any) -> int | None:
    """Returns beyond which length rotary positions depend on the longest text of a batch, or None."""
    found = getattr(config, "rope_parameters", None) or {}
    rules = [found] if "rope_type" in found else [rule for rule in found.values() if isinstance(rule, dict)]
    limits = []
    for rule in rules:
        if rule["rope_type"] == "longrope":
            limits.append(rule.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        elif rule["rope_type"] == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)
