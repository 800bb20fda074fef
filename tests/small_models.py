"""Tiny random models of every architecture whose blocks metarec runs itself, and of some that it runs whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
}
_DECODER = {
    **_SHAPE,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ENCODER = {**_SHAPE, "max_position_embeddings": 64}


def _model(name: str, architecture: str, settings: dict[str, Any]) -> Callable[[int], Any]:
    def make(vocabulary: int) -> Any:
        import transformers

        named = dict(settings)
        config = getattr(transformers, named.pop("config", f"{name}Config"))(vocab_size=vocabulary, **named)
        return getattr(transformers, name + architecture)(config)

    return make


def _decoder(name: str, architecture: str = "ForCausalLM", /, **changes: Any) -> Callable[[int], Any]:
    return _model(name, architecture, {**_DECODER, **changes})


def _encoder(name: str, architecture: str = "ForMaskedLM", /, **changes: Any) -> Callable[[int], Any]:
    return _model(name, architecture, {**_ENCODER, **changes})


def _longrope(trained: int) -> dict[str, Any]:
    rope = {
        **_ROPE,
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": trained,
    }
    return {"max_position_embeddings": 64, "original_max_position_embeddings": trained, "rope_parameters": rope}


_ROPE = {"rope_type": "default", "rope_theta": 10.0}
# Prompts have 12 to 16 tokens.
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 6, "layer_types": _WINDOWS}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
CAUSAL = {
    "llama": _decoder("Llama"),
    "llama-bias": _decoder("Llama", attention_bias=True, mlp_bias=True),
    "llama-scaled-rope": _decoder(
        "Llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": _decoder("Mistral"),
    "mistral-window": _decoder("Mistral", sliding_window=6),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "qwen3-window": _decoder("Qwen3", head_dim=8, use_sliding_window=True, sliding_window=5, layer_types=_WINDOWS),
    "smollm3": _decoder("SmolLM3", no_rope_layers=[1, 0, 1]),
    "smollm3-norope": _decoder(
        "SmolLM3", no_rope_layers=[1, 1, 0], use_sliding_window=True, sliding_window=5, layer_types=_WINDOWS
    ),
    "olmo2": _decoder("Olmo2"),
    "phi3": _decoder("Phi3", rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}),
    "phi3-longrope": _decoder("Phi3", **_longrope(32)),
    "phi3-longrope-15": _decoder("Phi3", **_longrope(15)),
    "gemma": _decoder("Gemma", head_dim=8),
    "gemma2": _decoder("Gemma2", **_GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    "gemma3": _decoder("Gemma3", **_GEMMA, config="Gemma3TextConfig"),
    "gpt2-depth": _model(
        "GPT2", "LMHeadModel", {**_SHAPE, **_TOKENS, "n_positions": 32, "scale_attn_by_inverse_layer_idx": True}
    ),
    "gpt-neox": _model("GPTNeoX", "ForCausalLM", {**_SHAPE, **_TOKENS}),
    "gpt-neox-serial": _model(
        "GPTNeoX",
        "ForCausalLM",
        {**_SHAPE, **_TOKENS, "use_parallel_residual": False, "attention_bias": False},
    ),
    "granite": _decoder("Granite", logits_scaling=4.0, residual_multiplier=0.5),
    "cohere": _decoder("Cohere", logit_scale=0.25),
    "gpt2": _model(
        "GPT2",
        "LMHeadModel",
        {"n_embd": 16, "n_layer": 3, "n_head": 4, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "starcoder2": _decoder("Starcoder2"),
    "opt": _decoder("OPT", ffn_dim=24, word_embed_proj_dim=16, init_std=0.4),
}
_MODERN = {
    "local_attention": 6,
    "layer_types": _WINDOWS,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "cls_token_id": 3,
    "sep_token_id": 4,
}
ENCODERS = {
    "bert": _encoder("Bert"),
    "encoder": _encoder("Bert", "Model"),
    "roberta": _encoder("Roberta", pad_token_id=1),
    "roberta-encoder": _encoder("Roberta", "Model", pad_token_id=1),
    "xlm-roberta": _encoder("XLMRoberta", pad_token_id=1),
    "mpnet": _encoder("MPNet", pad_token_id=1),
    "mpnet-encoder": _encoder("MPNet", "Model", pad_token_id=1),
    "modernbert": _encoder("ModernBert", **_MODERN),
    "modernbert-encoder": _encoder("ModernBert", "Model", **_MODERN),
    "bert-classifier": _encoder("Bert", "ForSequenceClassification"),
    "roberta-classifier": _encoder("Roberta", "ForSequenceClassification", pad_token_id=1),
    "llama-classifier": _decoder("Llama", "ForSequenceClassification"),
    "distilbert": _model(
        "DistilBert",
        "ForMaskedLM",
        {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 4, "initializer_range": 0.4},
    ),
    "electra": _encoder("Electra", embedding_size=16),
}


# Other tests know what these answer.
_AS_INITIALIZED = {"llama", "llama-bias", "mistral", "gpt2", "bert", "encoder"}


def tiny_model(name: str, vocabulary: int) -> Any:
    """Returns a random model; norms and biases are moved away from ones and zeros, where mistakes would not be seen."""
    model = {**CAUSAL, **ENCODERS}[name](vocabulary)
    if name not in _AS_INITIALIZED:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    return model


def without_head(masked: Path, directory: Path) -> Path:
    """Returns a masked model as sentence encoders are published: its configuration, without its head's weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(masked, directory)
    weights = load_file(masked / "model.safetensors")
    head = [name for name in weights if name.startswith(("lm_head", "cls"))]
    assert head
    bare = {name.partition(".")[2]: value.clone() for name, value in weights.items() if name not in head}
    save_file(bare, directory / "model.safetensors", {"format": "pt"})
    return directory
