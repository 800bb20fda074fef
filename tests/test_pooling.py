"""Sentence encoders pool as the files beside their weights say, and are recognised without a masked model's head."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small_adapters import placement_of
from small_models import without_head

from metarec.data.interactions import Catalog
from metarec.data.templates import PromptTemplate
from metarec.errors import BackboneError
from metarec.lm.answer_model import open_answer_model
from metarec.lm.loading import load_backbone, save_backbone
from metarec.lm.pooling import pooled_tokens
from metarec.lm.reference_forward import ReferenceForward
from metarec.lm.tokenized import tokenize_catalog
from metarec.lm.whole_texts import read_texts
from metarec.scorers.language.item_vectors import text_vectors

CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def published(directory: Path, source: Path, settings: dict[str, Any] | None, *others: str) -> Path:
    """Returns a copy of an encoder with the list of modules that sentence-transformers writes."""
    shutil.copytree(source, directory)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | {f"2_{kind}": kind for kind in others}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(listed))
    if settings is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("settings", [CLS, {"pooling_mode": "cls"}], ids=["flags", "name"])
def test_the_first_tokens_state_is_read_everywhere_where_the_encoder_says_so(
    settings: dict[str, Any], model_dir: Callable[[str], Path], catalog: Catalog, tmp_path: Path
) -> None:
    source = model_dir("encoder")
    encoder = load_backbone(str(published(tmp_path / "cls", source, settings)))
    assert (encoder.kind, encoder.pooling) == ("encoder", "first")
    assert encoder.fingerprint != load_backbone(str(source)).fingerprint
    template = PromptTemplate("{{ title }}", "good", "bad")
    prompts = tokenize_catalog(encoder, template, catalog)
    with torch.no_grad():
        states = [encoder.model(torch.tensor([ids])).last_hidden_state[0, 0] for ids in prompts.tokens]
        wanted = torch.nn.functional.normalize(torch.stack(states), dim=1)
    found = text_vectors(catalog, template, str(tmp_path / "cls"))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    placement = placement_of(encoder, prompts, None)
    reference = ReferenceForward(encoder, prompts, placement).frozen_states(np.arange(len(prompts.tokens)))
    torch.testing.assert_close(reference, wanted, atol=1e-5, rtol=1e-4)
    texts = [template.render(catalog, code) for code in range(len(catalog))]
    torch.testing.assert_close(read_texts(encoder, texts), wanted, atol=1e-5, rtol=1e-4)
    odds = open_answer_model(encoder, prompts, placement)
    yes, no = read_texts(encoder, ["good", "bad"])
    batch = odds.gather(torch.arange(len(catalog))[None])
    torch.testing.assert_close(odds.log_odds(batch, None)[0], wanted @ (yes - no) * 20, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}, None], ids=str)
def test_the_mean_of_all_tokens_is_read_where_it_says_that_or_nothing(
    settings: dict[str, Any] | None, model_dir: Callable[[str], Path], catalog: Catalog, tmp_path: Path
) -> None:
    source, template = model_dir("encoder"), PromptTemplate("{{ title }}", "good", "bad")
    encoder = published(tmp_path / "mean", source, settings)
    assert load_backbone(str(encoder)).fingerprint == load_backbone(str(source)).fingerprint
    np.testing.assert_array_equal(
        text_vectors(catalog, template, str(encoder)), text_vectors(catalog, template, str(source))
    )


@pytest.mark.parametrize(
    "settings", [{"pooling_mode": "lasttoken"}, {**CLS, "pooling_mode_mean_tokens": True}, {}], ids=str
)
def test_any_other_pooling_is_refused_by_name(
    settings: dict[str, Any], model_dir: Callable[[str], Path], tmp_path: Path, metarec: Callable[..., Ran]
) -> None:
    path = published(tmp_path / "odd", model_dir("encoder"), settings)
    ran = metarec("model", "prepare", path)
    assert (ran.status, "pools by" in ran.err, "Traceback" in ran.err) == (2, True, False), ran.err


def test_what_follows_the_pooling_and_is_not_read_is_named(
    model_dir: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = published(tmp_path / "dense", model_dir("encoder"), {"pooling_mode": "mean"}, "Normalize", "Dense")
    with caplog.at_level(logging.WARNING):
        load_backbone(str(path))
    assert "has modules that are not read: Dense" in caplog.text


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_that_was_fetched_without_its_modules_is_averaged_with_a_warning(
    listed: bool,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry = tmp_path / "models--tiny--encoder"
    snapshot = published(entry / "snapshots" / "c", model_dir("encoder"), CLS)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("c")
    if not listed:
        (snapshot / "modules.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert load_backbone("tiny/encoder").pooling == ("first" if listed else "mean")
    assert ("does not say how the encoder 'tiny/encoder' pools" in caplog.text) != listed


def test_a_causal_model_with_a_pooling_is_a_causal_model(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = published(tmp_path / "causal", model_dir("llama-bias"), {"pooling_mode": "lasttoken"})
    assert load_backbone(str(path)).kind == "causal"


def test_a_saved_encoder_pools_as_before(model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = load_backbone(str(published(tmp_path / "cls", model_dir("encoder"), CLS)))
    save_backbone(tmp_path / "saved", encoder)
    again = load_backbone(str(tmp_path / "saved"))
    assert again.pooling == "first"
    torch.testing.assert_close(read_texts(again, ["one title"]), read_texts(encoder, ["one title"]))


def test_pooled_tokens_of_texts_side_by_side() -> None:
    own = torch.tensor([[[True, True, False, False], [False, False, True, True]]])
    assert pooled_tokens(own, "first").tolist() == [[[True, False, False, False], [False, False, True, False]]]
    assert pooled_tokens(own, "mean") is own


@pytest.mark.parametrize("family", ["mpnet", "bert"])
def test_a_masked_model_without_its_head_is_an_encoder(
    family: str, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """all-mpnet-base-v2 is published so: its configuration still says MPNetForMaskedLM."""
    encoder = load_backbone(str(without_head(model_dir(family), tmp_path / "headless")))
    assert encoder.kind == "encoder"
    assert encoder.taken_apart.family is not None
    whole = load_backbone(str(model_dir(family)))
    for text in ("a title", "another one here"):
        tokens = torch.tensor(encoder.tokenize([text]))
        with torch.no_grad():
            wanted = whole.model.base_model(tokens).last_hidden_state.mean(1)
        torch.testing.assert_close(read_texts(encoder, [text]), torch.nn.functional.normalize(wanted, dim=1))


def test_a_masked_model_that_lacks_weights_below_its_head_is_refused(
    model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(model_dir("bert"), path)
    weights = load_file(path / "model.safetensors")
    gone = [name for name in weights if name.startswith("cls") or "layer.1." in name]
    save_file({name: value for name, value in weights.items() if name not in gone}, path / "model.safetensors")
    with pytest.raises(BackboneError, match="lacks"):
        load_backbone(str(path))
