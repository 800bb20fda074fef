"""What a frozen causal language model recalls of items: its states, half-way up, while it reads about each of them.

A prompt that asks one user's question is read for its answer. Here the model reads a sentence that people complete with
what they know, and the mean of its states over the whole sentence is kept, from a layer between those that take words
apart and those that choose the next one. Nothing is adapted; kept on disk.

Knows nothing of ratings, nor of how the sentence is worded.

Source: states of middle layers tell more than the last one's, Skean et al. 2025, "Layer by Layer: Uncovering Hidden
Representations in Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.artifacts import cache_dir, content_hash
from metarec.lm.backbone import Backbone
from metarec.lm.cache import Arrays, fill_cache

_KIND = "recall"
# Of a model's blocks; between a half and nine tenths it hardly matters where.
_DEPTH = 0.6


class _Reached(Exception):  # noqa: N818 - no error, but the way out of a model whose other blocks need not run
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def mean_hidden_states(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Reads texts and returns the mean state of each.

    The first token does not count: attention rests there when there is nothing to look at, so its state is large and
    says nothing (Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks").

    Args:
        backbone: A causal language model.
        texts: The texts, each of two tokens or more.

    Returns:
        Shape (texts, hidden), on the CPU.
    """
    tokens = backbone.tokenize(texts)
    blocks = max(1, round(_DEPTH * int(backbone.model.config.num_hidden_layers)))
    identity = {"backbone": backbone.fingerprint, "dtype": str(backbone.dtype), "tokens": tokens, "blocks": blocks}
    path = cache_dir() / _KIND / content_hash(identity)

    def read(items: np.ndarray, into: Arrays) -> None:
        into["states"][items] = _mean_states(backbone, [tokens[item] for item in items], blocks).numpy()

    lengths = np.array([len(ids) for ids in tokens])
    fill_cache(path, _KIND, lengths, {"states": (len(tokens), backbone.hidden_size)}, backbone.dtype, read)
    return torch.from_numpy(np.load(path / "states.npy", allow_pickle=False))


@torch.inference_mode()
def _mean_states(backbone: Backbone, tokens: Sequence[Sequence[int]], blocks: int) -> Tensor:
    lengths = torch.tensor([len(ids) for ids in tokens], device=backbone.device)
    width = int(lengths.max())
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in tokens], device=backbone.device)
    places = torch.arange(width, device=backbone.device)
    read = places < lengths[:, None]

    def leave(_module: Any, _inputs: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    last = backbone.model.get_submodule(f"{backbone.layer_path}.{blocks - 1}")
    hook = last.register_forward_hook(leave)
    try:
        backbone.model.base_model(input_ids=padded, attention_mask=read.long(), use_cache=False)
    except _Reached as reached:
        counted = (read & (places > 0)).to(reached.states.dtype)
        mean = torch.einsum("rt,rth->rh", counted, reached.states) / counted.sum(1, keepdim=True)
        return mean.to(torch.promote_types(mean.dtype, torch.float32)).cpu()
    finally:
        hook.remove()
    raise AssertionError("the model ended before its own blocks did")
