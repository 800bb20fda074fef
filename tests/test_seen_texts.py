"""What a model does not see of the items' texts is said, and never cut before the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATES
from small_recommenders import SETTINGS, TASK, known_task

from metarec import MetaRecommender
from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog
from metarec.data.task import Task
from metarec.data.task_data import TaskData, load_task_data
from metarec.errors import BackboneError, ConfigError, DataError
from metarec.lm.backbone import Backbone
from metarec.lm.hidden_states import mean_hidden_states
from metarec.lm.tokenized import tokenize_catalog

Backbones = Callable[..., Backbone]
LONG = Catalog(("short", "long"), {"title": ("night", "war " * 70), "genres": ("drama", "horror")})


def titled(titles: tuple[str, ...], **changes: Any) -> TaskData:
    known = known_task()
    catalog = replace(known.interactions.catalog, fields={"title": titles, "genres": ("drama",) * len(titles)})
    return replace(
        known, task=validated(Task, TASK | changes, "test"), interactions=replace(known.interactions, catalog=catalog)
    )


def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, SETTINGS, "test"))


def test_a_prompt_longer_than_the_model_is_refused(backbone: Backbones, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 texts of 'prompt\.text' .* the 64 tokens .*'long' has \d+\)"):
        tokenize_catalog(backbone("bert"), TEMPLATES["masked"], LONG)
    model = backbone("llama")
    monkeypatch.setattr(model.model.config, "max_position_embeddings", 16)
    with pytest.raises(ConfigError, match="the 16 tokens"):
        tokenize_catalog(model, TEMPLATES["causal"], LONG)
    with pytest.raises(BackboneError, match=r"'prompt\.hidden_states' has 20 tokens, .* reads 16"):
        mean_hidden_states(model, ["night", "war " * 20])


def test_an_encoders_text_is_cut_at_its_end_and_counted(backbone: Backbones, caplog: pytest.LogCaptureFixture) -> None:
    model = backbone("encoder")
    limit = model.max_tokens
    assert limit == 64
    with caplog.at_level(logging.WARNING):
        cut = tokenize_catalog(model, TEMPLATES["encoder"], LONG)
    whole = model.tokenize(cut.texts)
    assert (len(cut.tokens[1]), cut.tokens[1][:-1], cut.tokens[1][-1]) == (
        limit,
        tuple(whole[1][: limit - 1]),
        whole[1][-1],
    )
    assert cut.tokens[0] == tuple(whole[0])
    assert "1 of 2 texts" in caplog.text
    assert "their ends are cut off" in caplog.text


def test_roberta_has_fewer_positions_than_embeddings(backbone: Backbones) -> None:
    assert backbone("roberta").max_tokens == 64 - 2


def test_items_that_all_read_the_same_are_refused_before_anything_is_read(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarec.fitting.catalog_answer_model", None)
    with pytest.raises(ConfigError, match=r"all 40 items have the same prompt: .*Name a field in 'prompt\.text'"):
        recommender(model_dir).prepare(titled(("",) * 40))


def test_fit_counts_items_that_read_the_same_and_fields_that_are_cut(
    model_dir: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    titles = ("night", "night", "war " * 90, *(f"war {code}" for code in range(37)))
    with caplog.at_level(logging.WARNING):
        recommender(model_dir).prepare(titled(titles))
    assert "1 of 40 items have the same prompt as another" in caplog.text
    assert "'title' of 1 items has more than 300 characters" in caplog.text


def test_a_catalog_of_one_item_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("user,item,rating,title\n" + "".join(f"u{code},i,5,A\n" for code in range(9)))
    task = validated(Task, TASK | {"dataset": {"source": "table", "path": str(tmp_path)}}, "test")
    with pytest.raises(DataError, match="one item"):
        load_task_data(task, 0)
