"""Hidden-state features: mean states of a middle layer, the same however items are read together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from metarec.data.interactions import Catalog
from metarec.data.task_files import load_task
from metarec.data.templates import hidden_state_texts, review_sentence
from metarec.errors import ConfigError
from metarec.lm.backbone import Backbone
from metarec.lm.hidden_states import mean_hidden_states
from metarec.scorers.language import item_vectors
from metarec.scorers.language.item_vectors import hidden_state_vectors

TEXTS = ["a good movie", "is this a bad movie ?", "a dead movie , is this a good movie ?", "a good"]
Backbones = Callable[..., Backbone]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_text_is_the_mean_of_its_middle_states_but_the_first(backbone: Backbones, family: str) -> None:
    """Against transformers' own hidden states, read one text at a time without padding."""
    model = backbone(family)
    found = mean_hidden_states(model, TEXTS)
    for text, state in zip(TEXTS, found, strict=True):
        tokens = torch.tensor(model.tokenize([text]))
        with torch.no_grad():
            layers = model.model.base_model(input_ids=tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(state, layers[2][0, 1:].mean(0), rtol=1e-4, atol=1e-5)  # two of three blocks


def test_the_model_reads_whole_again_afterwards(backbone: Backbones) -> None:
    model = backbone("llama")
    tokens = torch.tensor(model.tokenize(TEXTS[:1]))
    before = model.model.base_model(input_ids=tokens).last_hidden_state
    mean_hidden_states(model, TEXTS)
    torch.testing.assert_close(model.model.base_model(input_ids=tokens).last_hidden_state, before)


def test_texts_are_read_once(backbone: Backbones, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone("llama")
    first = mean_hidden_states(model, TEXTS)
    monkeypatch.setattr("metarec.lm.hidden_states._mean_states", None)
    torch.testing.assert_close(mean_hidden_states(model, TEXTS), first)
    with pytest.raises(TypeError):
        mean_hidden_states(model, TEXTS[:2])


def test_an_interrupted_reading_goes_on_where_it_stopped(
    backbone: Backbones, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from metarec.lm import hidden_states

    model, texts = backbone("llama"), [f"a good movie {'? ' * (place % 7)}" for place in range(40)]
    whole = mean_hidden_states(model, texts)
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "second"))
    monkeypatch.setattr("metarec.lm.item_cache.BLOCK_ITEMS", 2)
    read, rows = hidden_states._mean_states, []

    def interrupted(model: Backbone, tokens: list[list[int]], blocks: int) -> torch.Tensor:
        if len(rows) == 36:
            raise KeyboardInterrupt
        rows.extend(tokens)
        return read(model, tokens, blocks)

    monkeypatch.setattr(hidden_states, "_mean_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mean_hidden_states(model, texts)
    rows.clear()
    torch.testing.assert_close(mean_hidden_states(model, texts), whole, rtol=1e-4, atol=1e-5)  # other blocks
    assert len(rows) == 4, "the 36 texts that were read are not read again"


def test_the_sentence_names_items_as_people_do(backbone: Backbones, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the article in front, what is missing left out, and no control token of the tokenizer."""
    model = backbone("llama")
    read: list[str] = []

    def reading(_: Backbone, texts: list[str]) -> torch.Tensor:
        read.extend(texts)
        return torch.from_numpy(np.random.default_rng(0).normal(size=(len(texts), 8)))

    monkeypatch.setattr(item_vectors, "mean_hidden_states", reading)
    titles = {"title": ("Matrix, The", "Heat", f"Se7en {model.special_tokens[0]}"), "year": ("1999", "", "1995")}
    hidden_state_vectors(model, Catalog(("1", "2", "3"), titles), [review_sentence("{{ title }} {{ year }}")])
    assert read[0].startswith('Review: "The Matrix" (1999). It')
    assert read[1].startswith('Review: "Heat". It')
    assert read[2].startswith('Review: "Se7en" (1995). It')


def test_a_task_says_what_is_read_and_keeps_its_digest_where_it_does_not() -> None:
    task = load_task("movielens/item-cold")
    catalog = Catalog(("1",), {"title": ("Matrix, The",), "year": ("1999",), "genres": ("",)})
    read = [text for sentence in task.prompt.hidden_states for text in hidden_state_texts(catalog, sentence)]
    assert read == [
        'Movie review: "The Matrix" (1999). The film was received by critics and audiences as',
        'The movie "The Matrix" (1999) tells the story of',
    ]
    assert "hidden_states" in task.model_dump()["prompt"]
    assert "hidden_states" not in load_task("movielens/user-cold").model_dump()["prompt"]


@pytest.mark.parametrize("sentence", ["{{ title", "{{ director }} made it"])
def test_a_sentence_that_does_not_fit_is_named(sentence: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.hidden_states"):
        hidden_state_texts(Catalog(("1",), {"title": ("Heat",)}), sentence)
