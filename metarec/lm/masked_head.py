"""A masked language model from an encoder's weights, for encoders that were published without their first head."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from metarec.errors import BackboneError
from metarec.files.artifacts import content_hash
from metarec.lm.backbone import Backbone
from metarec.lm.whole_model import transformers_package


def masked_from_encoder(encoder: Backbone, seed: int = 0) -> Backbone:
    """Returns an encoder as a masked LM: its weights, and a head that is drawn, over the embeddings of its words.

    Args:
        encoder: The encoder, which does not change.
        seed: Of the head, which has to be trained before what it says means anything.

    Raises:
        BackboneError: Its architecture has no masked LM, or its tokenizer no token for a blank.
    """
    if encoder.kind != "encoder" or encoder.tokenizer.mask_token is None:
        raise BackboneError(f"'{encoder.name}' is no encoder with a token for blanks", "Choose a BERT-like encoder")
    config = copy.deepcopy(encoder.model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = transformers_package().AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
        except ValueError:
            raise BackboneError(
                f"'{encoder.name}' is of an architecture without a masked LM", "Choose a BERT-like encoder"
            ) from None
    own = model.base_model.state_dict()
    model.base_model.load_state_dict({k: v for k, v in encoder.model.state_dict().items() if k in own})
    model.to(encoder.device, encoder.dtype).requires_grad_(False).eval()
    name, fingerprint = f"{encoder.name}, masked", content_hash([encoder.fingerprint, "masked", seed])
    return replace(encoder, name=name, kind="masked", fingerprint=fingerprint, modules=model, open_model=None)
