"""What a model does not see of the items' texts is said, and never cut before the answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TEMPLATES, Ran
from small_recommenders import SETTINGS, TASK, known_task

from metarec import MetaRecommender
from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog
from metarec.data.own_data import own_task
from metarec.data.seen_texts import check_texts
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
    monkeypatch.setattr("metarec.training.fitting.catalog_answer_model", None)
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


def test_items_whose_prompts_are_the_same_tokens_are_refused(model_dir: Callable[[str], Path]) -> None:
    words = tuple(f"w{code}" for code in range(40))  # all are unknown to the tokenizer
    with pytest.raises(ConfigError, match=r"all 40 texts of 'prompt\.text' are the same \d+ tokens"):
        recommender(model_dir).prepare(titled(words))


def long_texts(folder: Path) -> Path:
    """A table of people whose items have titles of up to seventy words."""
    people = range(12)
    rows = [f"u{user},i{item},{1 + (user + item) % 5},{'war ' * item}end" for user in people for item in range(1, 70)]
    (folder / "long.csv").write_text("\n".join(["user,item,rating,title", *rows]) + "\n")
    return folder / "long.csv"


def test_validate_and_check_count_tokens_with_a_named_model(
    metarec: Callable[..., Ran], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    table = long_texts(tmp_path)
    over = json.loads(metarec("data", "check", table, "--backbone", model_dir("bert"), "--json").out)["findings"]
    (found,) = [finding for finding in over if finding["code"] == "long-prompt"]
    assert (found["severity"], found["of"], found["total"]) == ("error", "items", 69)
    assert 0 < found["count"] < 69
    cut = metarec("data", "check", table, "--backbone", model_dir("encoder")).out
    assert "warning long-prompt" in cut
    assert "their ends are cut off" in cut
    fits = metarec("data", "check", table, "--backbone", model_dir("llama"))
    assert "long-prompt" not in fits.out
    assert "the 69 prompts have at most" in fits.err
    prompt = {"text": "{{ title }}\nAnswer:{% if mask %} {{ mask }}{% endif %}", "positive": " Yes", "negative": " No"}
    task = TASK | {"dataset": {"source": "table", "path": str(table)}, "prompt": prompt}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(task))
    sound = metarec("tasks", "validate", tmp_path / "long.yaml", "--backbone", model_dir("llama"))
    assert "tokens of a prompt:" in sound.out
    broken = metarec("tasks", "validate", tmp_path / "long.yaml", "--backbone", model_dir("bert"))
    assert broken.status == 1
    assert "are longer than the 64 tokens" in broken.out
    shortened = metarec("tasks", "validate", tmp_path / "long.yaml", "--backbone", model_dir("encoder"))
    assert "texts are cut at the 64 tokens" in shortened.out


def test_the_prompt_of_a_table_has_a_blank_for_a_masked_model(backbone: Backbones, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text(long_texts(tmp_path).read_text().replace("war " * 20, ""))
    task, data = own_task(tmp_path / "few.csv", {})
    assert tokenize_catalog(backbone("bert"), task.template, data.catalog).mask_token is not None
    assert task.template.render(data.catalog, 0).endswith("\nAnswer:")


def test_fields_that_nothing_reads_are_named() -> None:
    count = 40
    fields = {
        "title": tuple(f"night {code}" for code in range(count)),
        "kind": ("drama", "horror") * (count // 2),
        "shelf": tuple(f"SKU{code:04d}" for code in range(count)),
        "blurb": tuple(f"a tale of {code} roads told in {code + 3} nights" for code in range(count)),
        "shop": ("north",) * count,
    }
    catalog = Catalog(tuple(f"i{code}" for code in range(count)), fields)
    own = validated(Task, {**TASK, "prompt": {**TASK["prompt"], "text": "{{ title }} {{ shelf }} Answer:"}}, "test")
    (said,) = check_texts(own, catalog, prompt=True, text=False)
    assert said.startswith("fields of items that nothing reads: 'blurb' (text), 'shop' (one value); name them")
    named = validated(Task, {**own.model_dump(), "features": {"fields": ["kind"]}}, "test")
    assert check_texts(named, catalog, prompt=True, text=False) == []
