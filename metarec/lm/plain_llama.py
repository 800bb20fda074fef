"""Opens Llama's modules without transformers: names and weights alone, mapped from the files that hold them.

Blocks are all that a cached forward runs. To adapt to a person and to rank, nothing else of transformers is needed, and
importing its modeling code takes longer than both. What only transformers can do, `metarec.lm.backbone` opens it for.

Source: Touvron et al. 2023, "LLaMA"; rotary positions, Su et al. 2021, "RoFormer".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def open_llama(directory: Path, settings: Mapping[str, Any], dtype: torch.dtype) -> PlainLlama | None:
    """Opens a causal Llama; None where its files ask for more than is known here.

    Args:
        directory: Where its weights are, checked by `metarec.lm.model_files.check_model_dir`.
        settings: Its ``config.json``.
        dtype: Type of the weights; those of this type stay in the files that they are mapped from.
    """
    rope = settings.get("rope_parameters") or {"rope_theta": settings.get("rope_theta")}
    known = (
        settings.get("architectures") == ["LlamaForCausalLM"]
        and settings.get("model_type") == "llama"
        and settings.get("hidden_act") == "silu"
        and rope.get("rope_type", "default") == "default"
        and isinstance(rope.get("rope_theta"), int | float)
        and not {"rope_scaling", "quantization_config", "auto_map"} & {key for key, value in settings.items() if value}
        and {"hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"} <= settings.keys()
    )
    if not known:
        return None
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    tied = bool(settings.get("tie_word_embeddings", False))
    if set(tensors) - {"lm_head.weight"} != _names(settings) or (not tied and "lm_head.weight" not in tensors):
        return None
    cast = {name: value.to(dtype) for name, value in tensors.items() if not (tied and name == "lm_head.weight")}
    return PlainLlama(settings, cast, float(rope["rope_theta"]))


def _names(settings: Mapping[str, Any]) -> set[str]:
    """Returns the names of a Llama's weights, without biases and without the vocabulary head's."""
    parts = [f"{part}.{name}" for part, names in _LINEARS.items() for name in names] + list(_NORMS)
    layers = range(settings["num_hidden_layers"])
    blocks = {f"model.layers.{index}.{part}.weight" for index in layers for part in parts}
    return {*blocks, "model.embed_tokens.weight", "model.norm.weight"}


class PlainLlama(nn.Module):
    """A causal Llama's modules by the names that transformers gives them; it computes nothing by itself.

    Args:
        settings: Its ``config.json``.
        tensors: Its weights by name; without ``lm_head.weight`` the vocabulary head is the embedding.
        theta: Base of the rotary positions.
    """

    def __init__(self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], theta: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(**settings)
        self.model = _Base(self.config, tensors, theta)
        self.lm_head = _linear(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
        if "lm_head.weight" not in tensors:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> nn.Module:
        """The model without its head."""
        return self.model

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.lm_head.weight.dtype

    def get_output_embeddings(self) -> nn.Linear:
        """Returns the vocabulary head."""
        return self.lm_head


class _Base(nn.Module):
    def __init__(self, config: Any, tensors: Mapping[str, Tensor], theta: float) -> None:
        super().__init__()
        self.config = config
        table = tensors["model.embed_tokens.weight"]
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=True)
        blocks = (_block(config, tensors, f"model.layers.{index}.") for index in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = _RMSNorm(tensors["model.norm.weight"], config.rms_norm_eps)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rotary_emb = _Rotary(head_dim, theta)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.embed_tokens.weight.dtype
        return found

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.embed_tokens
        return found


class _RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps


class _Rotary(nn.Module):
    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self.register_buffer("frequencies", 1.0 / theta**exponents, persistent=False)

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines of positions (rows, tokens), of the type of `like`."""
        frequencies: Any = self.frequencies
        angles = positions[..., None].float() * frequencies
        both = torch.cat([angles, angles], -1)
        return both.cos().to(like.dtype), both.sin().to(like.dtype)


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _block(config: Any, tensors: Mapping[str, Tensor], path: str) -> nn.Module:
    """Returns a block; its modules are in transformers' order, in which adapters draw their first numbers."""
    block = nn.Module()
    for part, names in _LINEARS.items():
        inner = nn.Module()
        for name in names:
            inner.add_module(name, _linear(tensors[f"{path}{part}.{name}.weight"]))
        if part == "mlp":
            inner.add_module("act_fn", nn.SiLU())
        block.add_module(part, inner)
    for name in _NORMS:
        block.add_module(name, _RMSNorm(tensors[f"{path}{name}.weight"], config.rms_norm_eps))
    return block
