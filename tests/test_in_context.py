"""Prompted methods: what they read is what they say they read, and a history read once is a history read whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEMPLATES, WORDS, small_catalog
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metarec.data.interactions import Catalog, Ratings
from metarec.data.templates import content_free
from metarec.errors import BackboneError, ConfigError, UnknownItemError
from metarec.lm.answer_model import open_answer_model
from metarec.lm.backbone import Backbone
from metarec.lm.placement import default_placement
from metarec.lm.tokenized import CatalogPrompts
from metarec.scorer import Request, Scorer
from metarec.scorers.language.in_context import History, InContext
from metarec.scorers.language.listwise import Listwise
from metarec.scorers.language.zero_shot import ZeroShot, calibrated_zero_shot

Backbones = Callable[..., Backbone]
CATALOG = small_catalog()
LABELS = tuple(WORDS[:6])  # the tiny tokenizers know no capital letters
HISTORY = History(TEMPLATES["causal"], CATALOG, threshold=3.5, limit=4)
CANDIDATES = np.array([4, 9, 14, 20, 21, 33, 38], np.int64)


def ratings(*pairs: tuple[int, float]) -> Ratings:
    return Ratings(np.array([code for code, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float32))


SUPPORT = ratings((0, 5.0), (1, 4.5), (2, 2.0), (3, 1.5), (8, 4.0))

SCORERS: dict[str, Callable[[Backbone], Scorer]] = {
    "in-context prompt": lambda model: InContext(model, HISTORY),
    "in-context, calibrated": lambda model: InContext(model, HISTORY, calibrated=True, name="in-context, calibrated"),
    "in-context, listwise": lambda model: Listwise(model, HISTORY, rounds=2, labels=LABELS),
}
every_scorer = pytest.mark.parametrize("method", SCORERS)


@pytest.fixture
def scorer(backbone: Backbones) -> Callable[[str], Scorer]:
    return lambda method: SCORERS[method](backbone("llama"))


def whole(model: Backbone, text: str) -> Tensor:
    """Log-probabilities of the next token by one plain pass of the transformers model."""
    with torch.no_grad():
        return model.model(torch.tensor([model.tokenize([text])[0]])).logits[0, -1].log_softmax(-1)


def token(model: Backbone, word: str) -> int:
    return int(model.tokenizer.convert_tokens_to_ids(word.strip()))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("support", [SUPPORT, Ratings.empty()], ids=["history", "no history"])
def test_a_history_read_once_gives_what_the_whole_prompt_gives(
    family: str, support: Ratings, backbone: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metarec.lm.backbone._TEXTS_AT_ONCE", 3)
    model = backbone(family)
    plain, calibrated = InContext(model, HISTORY), InContext(model, HISTORY, calibrated=True)
    request = Request("a", support, CANDIDATES)

    def odds(text: str) -> float:
        probabilities = whole(model, text)
        return float(probabilities[token(model, "Yes")] - probabilities[token(model, "No")])

    expected = np.array([odds(plain.prompt_text(request, code)) for code in CANDIDATES])
    np.testing.assert_allclose(plain.score([request])[0], expected, atol=1e-4)
    blank = odds(HISTORY.text(support, ()) + TEMPLATES["causal"].render(content_free(CATALOG), 0))
    np.testing.assert_allclose(calibrated.score([request])[0], expected - blank, atol=1e-4)


def test_the_prompt_is_solved_examples_and_then_the_question(backbone: Backbones) -> None:
    scorer = InContext(backbone("llama"), HISTORY)
    text = scorer.prompt_text(Request("a", ratings((0, 5.0), (2, 1.0)), CANDIDATES), 4)
    render = TEMPLATES["causal"].render
    first, second, question = text.split("\n\n")
    assert {first, second} == {render(CATALOG, 0) + " Yes", render(CATALOG, 2) + " No"}
    assert question == render(CATALOG, 4)
    assert scorer.prompt_text(Request("a", Ratings.empty(), CANDIDATES), 4) == render(CATALOG, 4)


@given(
    rated=st.dictionaries(st.integers(0, 39), st.integers(1, 10), max_size=20),
    limit=st.integers(2, 8),
    seed=st.integers(0, 3),
)
def test_examples_are_few_of_both_classes_and_know_no_order(rated: dict[int, int], limit: int, seed: int) -> None:
    history = replace(HISTORY, limit=limit, seed=seed)
    support = ratings(*((code, half / 2) for code, half in rated.items()))
    items, likes = history.examples(support)
    assert len(items) == min(limit, len(support)) == len(set(items.tolist()))
    assert list(likes) == [rated[int(code)] / 2 >= 3.5 for code in items]
    assert set(likes) == {bool(like) for like in support.likes(3.5)}
    turned = support.rows(np.arange(len(support))[::-1])
    np.testing.assert_array_equal(history.examples(turned)[0], items)


def test_the_seed_chooses_the_examples() -> None:
    support = ratings(*((code, 5.0) for code in range(30)))
    shown = {tuple(replace(HISTORY, seed=seed).examples(support)[0].tolist()) for seed in range(3)}
    assert len(shown) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_listwise_score_is_the_mean_log_probability_of_the_letter(family: str, backbone: Backbones) -> None:
    model = backbone(family)
    scorer = Listwise(model, HISTORY, rounds=3, labels=LABELS)
    total = dict.fromkeys(CANDIDATES.tolist(), 0.0)
    for shown in scorer._lists(CANDIDATES):
        text = scorer._text(HISTORY.text(SUPPORT, ()), shown)
        asked = whole(model, text)[[token(model, label) for label in LABELS[: len(shown)]]].log_softmax(0)
        for code, value in zip(shown.tolist(), asked, strict=True):
            total[code] += (float(value) + np.log(len(shown))) / 3
    (scores,) = scorer.score([Request("a", SUPPORT, CANDIDATES)])
    np.testing.assert_allclose(scores, list(total.values()), atol=1e-4)


def test_every_round_asks_about_every_candidate_once_in_another_order(backbone: Backbones) -> None:
    scorer = Listwise(backbone("llama"), HISTORY, rounds=4, labels=LABELS)
    lists = scorer._lists(np.arange(40))
    rounds = [np.concatenate(lists[start : start + 7]) for start in range(0, 28, 7)]
    assert {len(shown) for shown in lists} == {5, 6}
    assert all(sorted(shown) == list(range(40)) for shown in rounds)
    assert len({tuple(shown) for shown in rounds}) == 4


def test_candidates_of_one_title_are_one_line_of_a_list_and_have_one_score(backbone: Backbones) -> None:
    titles = CATALOG.fields["title"]
    catalog = Catalog(CATALOG.ids, {**CATALOG.fields, "title": (*titles[:9], titles[4], *titles[10:])})
    scorer = Listwise(backbone("llama"), replace(HISTORY, catalog=catalog), labels=LABELS)
    alike = Request("a", SUPPORT, CANDIDATES)
    assert CANDIDATES[:2].tolist() == [4, 9]
    (scores,) = scorer.score([alike])
    (without,) = scorer.score([replace(alike, candidates=np.delete(CANDIDATES, 1))])
    assert scores[0] == scores[1]
    assert torch.equal(scores[[0, *range(2, len(scores))]], without)
    assert scorer.prompt_text(alike, 4) == scorer.prompt_text(alike, 9)


def test_a_list_has_no_text_for_an_item_that_is_not_in_it(backbone: Backbones) -> None:
    scorer = Listwise(backbone("llama"), HISTORY, labels=LABELS)
    for code in (5, -1, 40):
        with pytest.raises(UnknownItemError, match=f"item code {code} is not one of the request's candidates"):
            scorer.prompt_text(Request("a", SUPPORT, CANDIDATES), code)


def test_a_list_shows_titles_behind_letters(backbone: Backbones) -> None:
    text = Listwise(backbone("llama"), HISTORY, labels=LABELS).prompt_text(Request("a", SUPPORT, CANDIDATES), 9)
    assert text.startswith(HISTORY.text(SUPPORT, ()))
    lines = text.rsplit("\n\n", 1)[1].splitlines()
    assert lines[0].startswith("Which one")
    assert CATALOG.title(9) in {line.split(". ", 1)[1] for line in lines[1:-1]}
    assert lines[-1] == "Answer:"


@every_scorer
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_support_and_candidates_get_finite_scores(
    method: str, model_dir: Callable[[str], object], backbone: Backbones, data: st.DataObject
) -> None:
    codes = st.integers(0, 39)
    rated = data.draw(st.dictionaries(codes, st.integers(1, 10), max_size=8))
    asked = np.array(data.draw(st.lists(codes, max_size=8)), np.int64)
    support = ratings(*((code, half / 2) for code, half in rated.items()))
    (scores,) = SCORERS[method](backbone("llama")).score([Request("somebody new", support, asked)])
    assert scores.shape == (len(asked),)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@every_scorer
def test_a_batch_scores_as_one_by_one(method: str, scorer: Callable[[str], Scorer]) -> None:
    requests = [
        Request("a", SUPPORT, CANDIDATES),
        Request("b", Ratings.empty(), CANDIDATES[:3]),
        Request("c", SUPPORT.head(2), np.arange(40)),
        Request("d", SUPPORT.head(1), np.zeros(0, np.int64)),
    ]
    together = scorer(method).score(requests)
    assert [len(scores) for scores in together] == [7, 3, 40, 0]
    for request, scores in zip(requests, together, strict=True):
        np.testing.assert_allclose(scores, scorer(method).score([request])[0], atol=1e-5)
    assert scorer(method).score([]) == []


@every_scorer
def test_neither_order_nor_name_matters_but_the_ratings_do(method: str, scorer: Callable[[str], Scorer]) -> None:
    (scores,) = scorer(method).score([Request("a", SUPPORT, CANDIDATES)])
    backwards = SUPPORT.rows(np.arange(len(SUPPORT))[::-1])
    (turned,) = scorer(method).score([Request("u59", backwards, CANDIDATES[::-1].copy())])
    np.testing.assert_allclose(turned.flip(0), scores, atol=1e-5)
    opposite = Ratings(SUPPORT.items, (6 - SUPPORT.values).astype(np.float32))
    assert not np.allclose(scorer(method).score([Request("a", opposite, CANDIDATES)])[0], scores)


@every_scorer
def test_an_item_asked_twice_scores_the_same_twice(method: str, scorer: Callable[[str], Scorer]) -> None:
    (scores,) = scorer(method).score([Request("a", SUPPORT, np.array([7, 4, 7], np.int64))])
    assert scores[0] == scores[2]
    np.testing.assert_allclose(
        scores[:2], scorer(method).score([Request("a", SUPPORT, np.array([7, 4], np.int64))])[0], atol=1e-6
    )


@every_scorer
@pytest.mark.parametrize("code", [-1, 40])
def test_an_item_code_outside_the_catalog_is_refused(method: str, code: int, scorer: Callable[[str], Scorer]) -> None:
    outside = np.array([code], np.int64)
    for request in (Request("a", SUPPORT, outside), Request("a", ratings((code, 4.0)), CANDIDATES)):
        with pytest.raises(UnknownItemError, match=f"item code {code} is not one of the 40"):
            scorer(method).score([request])


@every_scorer
def test_it_is_called_what_tables_call_it(method: str, scorer: Callable[[str], Scorer]) -> None:
    assert scorer(method).name == method
    assert scorer(method).bytes_per_user == 0


def test_shared_tokens_are_counted_once(backbone: Backbones) -> None:
    model = backbone("llama")
    scorer = InContext(model, HISTORY)
    request = Request("a", SUPPORT, np.array([4, 9, 4], np.int64))
    first, second = (model.tokenize([scorer.prompt_text(request, code)])[0] for code in (4, 9))
    shared = next(place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    assert shared >= len(model.tokenize([HISTORY.text(SUPPORT, ())])[0])
    assert scorer.tokens_read(request) == len(first) + len(second) - shared
    assert scorer.tokens_read(Request("a", SUPPORT, request.candidates[:0])) == 0
    assert InContext(model, HISTORY, calibrated=True).tokens_read(request) > scorer.tokens_read(request)
    listwise = Listwise(model, HISTORY, rounds=1, labels=LABELS)
    assert listwise.tokens_read(request) == len(model.tokenize([listwise.prompt_text(request, 4)])[0])


@pytest.mark.parametrize("family", ["bert", "encoder"])
def test_models_that_do_not_read_left_to_right_are_refused(family: str, backbone: Backbones) -> None:
    with pytest.raises(ConfigError, match="left to right"):
        Listwise(backbone(family), HISTORY)
    with pytest.raises(BackboneError, match="left to right"):
        backbone(family).last_states([[1, 2]], 0)


def test_a_history_beyond_the_models_reach_and_too_small_settings_are_refused(backbone: Backbones) -> None:
    model = backbone("gpt2")
    limit = model.model.config.max_position_embeddings
    with pytest.raises(BackboneError, match=f"{limit + 1} tokens, .* reads {limit}"):
        model.last_states([[1] * (limit + 1)], 0)
    with pytest.raises(ConfigError, match="limit is 1"):
        replace(HISTORY, limit=1)
    with pytest.raises(ConfigError, match="0 rounds"):
        Listwise(model, HISTORY, rounds=0)
    with pytest.raises(BackboneError, match="answer word ' A'"):
        Listwise(model, HISTORY).score([Request("a", SUPPORT, CANDIDATES)])


def zero_shot(model: Backbone, read: CatalogPrompts) -> tuple[ZeroShot, ZeroShot]:
    placed = default_placement(model, read, layers=1, targets=None, rank=1, alpha=1.0, active_tokens="auto")
    answer_model = open_answer_model(model, read, placed)
    return ZeroShot(answer_model), calibrated_zero_shot(answer_model, TEMPLATES[model.kind], CATALOG)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "encoder"])
def test_calibration_moves_all_items_alike(
    family: str, backbone: Backbones, prompts: Callable[[str], CatalogPrompts]
) -> None:
    plain, calibrated = zero_shot(backbone(family), prompts(family))
    request = Request("a", SUPPORT, CANDIDATES)
    moved = plain.score([request])[0] - calibrated.score([request])[0]
    np.testing.assert_allclose(moved, float(moved[0]), atol=1e-5)
    assert abs(float(moved[0])) > 1e-3
    assert (plain.name, calibrated.name) == ("zero-shot prompt", "zero-shot, calibrated")


def test_a_prompt_without_content_is_calibrated_to_even_odds(
    backbone: Backbones, prompts: Callable[[str], CatalogPrompts]
) -> None:
    model = backbone("llama")
    blank = whole(model, TEMPLATES["causal"].render(content_free(CATALOG), 0))
    _, calibrated = zero_shot(model, prompts("llama"))
    assert calibrated.bias == pytest.approx(float(blank[token(model, "Yes")] - blank[token(model, "No")]), abs=1e-4)


def test_zero_shot_says_what_it_reads(backbone: Backbones, prompts: Callable[[str], CatalogPrompts]) -> None:
    for family in ("llama", "bert"):
        model, read = backbone(family), prompts(family)
        scorer, _ = zero_shot(model, read)
        request = Request("a", SUPPORT, CANDIDATES)
        lengths = [len(model.tokenize([scorer.prompt_text(request, code)])[0]) for code in CANDIDATES]
        assert lengths == [len(read.tokens[code]) for code in CANDIDATES]
        repeated = read.prefix * (len(CANDIDATES) - 1) if family == "llama" else 0
        assert scorer.tokens_read(request) == sum(lengths) - repeated
        assert scorer.tokens_read(Request("a", SUPPORT, CANDIDATES[:0])) == 0


def test_control_tokens_in_titles_stay_out_of_lists(backbone: Backbones) -> None:
    titles = ("<pad>night", *CATALOG.fields["title"][1:])
    catalog = Catalog(CATALOG.ids, {**CATALOG.fields, "title": titles})
    scorer = Listwise(backbone("llama"), replace(HISTORY, catalog=catalog), labels=LABELS)
    assert "<pad>" not in scorer.prompt_text(Request("a", ratings((0, 5.0)), np.arange(3)), 0)
