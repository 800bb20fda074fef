"""The expected rating is what the whole model's own probabilities say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEMPLATES
from small_recommenders import SETTINGS, TASK, known_task

from metarec.config import RunConfig, validated
from metarec.data.interactions import Catalog, Ratings, RatingScale
from metarec.data.task import Task
from metarec.errors import ConfigError
from metarec.lm.answer_model import AnswerModel, open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.placement import default_placement
from metarec.lm.tokenized import CatalogPrompts
from metarec.recommender import MetaRecommender
from metarec.scorer import Request
from metarec.scorers.language.expected_rating import expected_rating

WORDS = (" dead", " blue", " good")


def reader_of(model: Backbone, prompts: CatalogPrompts) -> AnswerModel:
    placement = default_placement(model, prompts, layers=1, targets=None, rank=2, alpha=4.0, active_tokens="auto")
    return open_answer_model(model, prompts, placement)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_expected_rating_is_the_models_own(
    family: str, backbone: Callable[..., Backbone], prompts: Callable[[str], CatalogPrompts], catalog: Catalog
) -> None:
    model, read = backbone(family), prompts(family)
    scorer = expected_rating(reader_of(model, read), TEMPLATES["causal"], catalog, WORDS, RatingScale(1.0, 5.0))
    asked = np.array([7, 3])
    (scores,) = scorer.score([Request("u", Ratings.empty(), asked)])
    for item, score in zip(asked, scores, strict=True):
        with torch.no_grad():
            logits = model.model(torch.tensor([read.tokens[item]])).logits[0, -1]
        words = [model.tokenizer.convert_tokens_to_ids(word.strip()) for word in WORDS]
        expected = logits[words].softmax(0) @ torch.tensor([1.0, 3.0, 5.0])
        assert float(score) == pytest.approx(float(expected), abs=1e-4)


def test_one_word_or_no_head_is_refused(
    backbone: Callable[..., Backbone], prompts: Callable[[str], CatalogPrompts], catalog: Catalog
) -> None:
    for family, words in (("llama", WORDS[:1]), ("encoder", WORDS)):
        answer_model = reader_of(backbone(family), prompts(family))
        with pytest.raises(ConfigError, match=r"prompt\.ratings"):
            expected_rating(answer_model, TEMPLATES["causal"], catalog, words, RatingScale(1.0, 5.0))


def test_a_task_of_ratings_is_trained_evaluated_and_measured_in_stars(model_dir: Callable[[str], Path]) -> None:
    quick = SETTINGS | {"train": {"steps": 2, "users": 4, "shots": [5], "validate_every": 2}}
    data = known_task()
    words = {**data.task.prompt.model_dump(), "ratings": list(WORDS)}
    values = {key: value for key, value in TASK.items() if key != "like_threshold"}
    task = validated(Task, values | {"label": "rating", "metrics": ["mae", "rmse"], "prompt": words}, "test")
    stars = replace(data, task=task, interactions=task.rule.apply(data.interactions))
    recommender = MetaRecommender.from_pretrained(model_dir("llama"), validated(RunConfig, quick, "test")).fit(stars)
    report = recommender.evaluate(stars)
    cells = {(cell.method, cell.shots): cell.means for cell in report.cells()}
    assert set(report.metrics) == {"auc", "ndcg@10", "mae", "rmse"}
    assert 0 < cells["metarec, adapted", 10]["mae"] <= cells["metarec, adapted", 10]["rmse"] < 2.5
    assert ("expected rating, prompt", 0) in cells
    recommender_json = report.to_json()
    assert recommender_json["hashes"] == stars.hashes
    assert "mae" in recommender_json["rows"][0]
