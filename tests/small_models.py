"""Tiny random models of every architecture whose blocks metarec runs itself, and of some that it runs whole."""

from __future__ import annotations

from collections.abc import Callable
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

        config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **settings)
        return getattr(transformers, name + architecture)(config)

    return make


def _decoder(name: str, architecture: str = "ForCausalLM", /, **changes: Any) -> Callable[[int], Any]:
    return _model(name, architecture, {**_DECODER, **changes})


def _encoder(name: str, architecture: str = "ForMaskedLM", /, **changes: Any) -> Callable[[int], Any]:
    return _model(name, architecture, {**_ENCODER, **changes})


# The longest prompt has 23 tokens, the shortest 15.
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
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
    "gpt2": _model(
        "GPT2",
        "LMHeadModel",
        {"n_embd": 16, "n_layer": 3, "n_head": 4, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "starcoder2": _decoder("Starcoder2"),
    "opt": _decoder("OPT", ffn_dim=24, word_embed_proj_dim=16, init_std=0.4),
}
ENCODERS = {
    "bert": _encoder("Bert"),
    "encoder": _encoder("Bert", "Model"),
    "roberta": _encoder("Roberta", pad_token_id=1),
    "distilbert": _model(
        "DistilBert",
        "ForMaskedLM",
        {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 4, "initializer_range": 0.4},
    ),
    "electra": _encoder("Electra", embedding_size=16),
}


# Other tests know what these answer.
_AS_INITIALIZED = {"llama", "llama-bias", "mistral", "gpt2", "bert", "encoder", "roberta", "distilbert"}


def tiny_model(name: str, vocabulary: int) -> Any:
    """Returns a random model; norms and biases are moved away from ones and zeros, where mistakes would not be seen."""
    model = {**CAUSAL, **ENCODERS}[name](vocabulary)
    if name not in _AS_INITIALIZED:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    return model
