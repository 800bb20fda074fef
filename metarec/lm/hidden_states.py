"""Computes hidden-state features of texts: the mean state of a frozen causal language model over each text.

The states come from a middle layer (60% depth). Nothing is adapted; the features are kept in a cache on disk.

Source: middle layers give better features than the last one, Skean et al. 2025, "Layer by Layer: Uncovering Hidden
Representations in Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec.errors import BackboneError
from metarec.files.artifacts import cache_dir, content_hash
from metarec.lm.backbone import Backbone
from metarec.lm.item_cache import ItemCache, Rows, read_missing

_KIND = "hidden-states"
# Share of the model's blocks that run; between 0.5 and 0.9 the results hardly differ.
_DEPTH = 0.6


class _Reached(Exception):  # noqa: N818 - no error: ends the model's run, since the blocks above are not needed
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def mean_hidden_states(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Returns the mean state of each text, from the cache or by reading it.

    The first token is left out: attention that finds nothing rests on it, so its state is large and carries no content
    (Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks").

    Args:
        backbone: A causal language model.
        texts: The texts, each of two tokens or more.

    Returns:
        Shape (texts, hidden), on the CPU.

    Raises:
        BackboneError: A text is longer than the model reads.
    """
    tokens = backbone.tokenize(texts)
    longest, limit = max(map(len, tokens)), backbone.max_tokens
    if limit is not None and longest > limit:
        raise BackboneError(
            f"a sentence of 'prompt.hidden_states' has {longest} tokens, '{backbone.name}' reads {limit}",
            "Cut a field in it, such as {{ text[:200] }}",
        )
    blocks = max(1, round(_DEPTH * int(backbone.modules.config.num_hidden_layers)))
    identity = {"backbone": backbone.fingerprint, "dtype": str(backbone.dtype), "tokens": tokens, "blocks": blocks}
    path = cache_dir() / _KIND / content_hash(identity)

    rows = Rows(np.ones(len(tokens), np.int64), (backbone.hidden_size,), "float32")
    cache = ItemCache(path, {"states": rows})

    def read(items: np.ndarray) -> dict[str, np.ndarray]:
        states = _mean_states(backbone, [tokens[item] for item in items], blocks)
        return {"states": states.numpy().astype(np.float32)}

    read_missing(cache, np.arange(len(tokens)), np.array([len(ids) for ids in tokens]), read, backbone.readers)
    flat, starts = cache.rows("states")
    return torch.from_numpy(flat[starts])


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
