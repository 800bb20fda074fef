"""Keeps a catalog's prompts as tokens in the directory of a recommender, so that loading it tokenizes nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.errors import ArtifactError
from metarec.files.artifacts import dump_json, load_json
from metarec.lm.backbone import Backbone
from metarec.lm.tokenized import CatalogPrompts, ItemTexts, TokenRows
from metarec.system.tensors import read_tensors, write_tensors

_TOKENS, _FACTS = "prompts.safetensors", "prompts.json"


def write_prompts(directory: Path, prompts: CatalogPrompts) -> None:
    """Writes a catalog's prompts into a directory that the caller makes."""
    starts, flat = torch.from_numpy(prompts.tokens.starts), torch.from_numpy(prompts.tokens.flat)
    write_tensors(directory / _TOKENS, {"flat": flat, "starts": starts})
    facts = {
        "prefix": prompts.prefix,
        "suffix": prompts.suffix,
        "answers": prompts.answers,
        "mask_token": prompts.mask_token,
        "answer_texts": prompts.answer_texts,
        "digest": prompts.digest,
    }
    (directory / _FACTS).write_text(dump_json(facts), encoding="utf-8")


def read_prompts(
    directory: Path, backbone: Backbone, template: PromptTemplate, catalog: Catalog
) -> CatalogPrompts | None:
    """Reads what `write_prompts` wrote; the texts are rendered when they are asked for.

    Args:
        directory: A directory that was verified.
        backbone: The model that the prompts are tokens of.
        template: The prompt.
        catalog: The items.

    Returns:
        The prompts; None where there are none: metarec kept none once.

    Raises:
        ArtifactError: They are of another catalog.
    """
    if not (directory / _FACTS).exists():
        return None
    facts, tensors = load_json(directory / _FACTS), read_tensors(directory / _TOKENS)
    tokens = TokenRows(tensors["flat"].numpy(), tensors["starts"].numpy())
    if len(tokens) != len(catalog) or int(tokens.starts[-1]) != len(tokens.flat):
        raise ArtifactError(
            f"'{directory / _TOKENS}' holds the prompts of another catalog", "Save the recommender again"
        )
    yes, no = facts["answer_texts"]
    return CatalogPrompts(
        texts=ItemTexts(backbone, template, catalog),
        tokens=tokens,
        prefix=facts["prefix"],
        suffix=facts["suffix"],
        answers=None if facts["answers"] is None else (facts["answers"][0], facts["answers"][1]),
        mask_token=facts["mask_token"],
        answer_texts=(tuple(yes), tuple(no)),
        known_digest=facts["digest"],
    )
