"""In-context recommendation: the prompt contains the user's history as solved examples, and nothing is trained.

What is known of the user, of the moments of ratings and of the moment of the question is said in words; of a user of
whom nothing is known the prompt says nothing.

There is one prompt per candidate; `metarec.scorers.language.listwise` has one per list of them. The common start of a
user's prompts, which includes the history, goes through a causal LM once; models that see in both directions read every
prompt whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Catalog, Codes, Ratings
from metarec.data.side import ABOUT, Side, Texts
from metarec.data.templates import PromptTemplate, clean_field, content_free
from metarec.errors import ConfigError
from metarec.lm.backbone import Backbone
from metarec.lm.tokenized import common_start
from metarec.lm.whole_texts import read_texts, text_log_odds
from metarec.scorer import Request, check_codes
from metarec.system.progress import progress

_BETWEEN = "\n\n"
_PERSON = "About the person:"
_NOW = "Now:"


@dataclass(frozen=True)
class History:
    """Writes a user's ratings as text: the task's prompt for each rated item, followed by its answer word.

    In a prompt with a blank, the word fills the blank.

    Args:
        template: The task's prompt.
        catalog: The items.
        threshold: Ratings from here on are likes; NaN where likes are ratings above the mean of the user's.
        limit: Number of examples at most.
        seed: Examples are chosen and ordered by a hash of seed and item, independent of the order of the ratings.
    """

    template: PromptTemplate
    catalog: Catalog
    threshold: float
    limit: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit < 2:
            raise ConfigError(
                f"the history's limit is {self.limit}", "Two examples show both answers: choose 2 or more"
            )

    def examples(self, support: Ratings) -> tuple[Codes, Sequence[bool]]:
        """Chooses the items that are shown, with at least one like and one dislike if there are both.

        Returns:
            Item codes in the order of the prompt, and whether each is a like.
        """
        likes = support.likes(self.threshold)
        ranks = [self.rank(code) for code in support.items]
        order = sorted(range(len(support)), key=lambda row: (ranks[row], float(support.values[row])))
        shown = order[-self.limit :]
        rest = order[: -self.limit]
        if len({bool(likes[row]) for row in shown}) == 1:
            others = [row for row in rest if likes[row] != likes[shown[0]]]
            shown = [*others[-1:], *shown[len(others[-1:]) :]]
        return support.items[shown], [bool(likes[row]) for row in shown]

    def rank(self, code: int, salt: str = "") -> bytes:
        """Returns a hash of seed and item id to sort by."""
        text = f"{self.seed}\0{salt}\0{self.catalog.ids[code]}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    def text(self, support: Ratings, special_tokens: Sequence[str]) -> str:
        """Returns the text before the question; empty for a user without ratings of whom nothing is known."""
        return self.person(support.side, special_tokens) + "".join(self.texts(support, special_tokens))

    @staticmethod
    def person(side: Side | None, special_tokens: Sequence[str]) -> str:
        """Returns what is known of a user in words, before their ratings; empty where nothing is."""
        known = _said({} if side is None else side.about, special_tokens)
        return f"{_PERSON} {known}.{_BETWEEN}" if known else ""

    @staticmethod
    def moment(side: Side | None, row: int, special_tokens: Sequence[str]) -> str:
        """Returns the moment in which one item is asked about in words, before its question; empty where unknown."""
        known = _said({} if side is None else _at(side.asked, row), special_tokens)
        return f"{_NOW} {known}.{_BETWEEN}" if known else ""

    def texts(self, support: Ratings, special_tokens: Sequence[str]) -> list[str]:
        """Returns the text of every example, in the order of the prompt."""
        items, likes = self.examples(support)
        words = {True: self.template.positive, False: self.template.negative}
        said = self._beside(support, special_tokens)
        return [
            self._solved(int(code), words[liked], special_tokens) + said.get(int(code), "") + _BETWEEN
            for code, liked in zip(items, likes, strict=True)
        ]

    def _solved(self, code: int, word: str, special_tokens: Sequence[str]) -> str:
        solved = self.template.render(self.catalog, code, special_tokens, word.strip())
        return solved if self.template.has_blank else solved + word

    @staticmethod
    def _beside(support: Ratings, special_tokens: Sequence[str]) -> dict[int, str]:
        """Returns what the user wrote about items and when they rated them, behind their answers."""
        side = support.side
        if side is None:
            return {}
        found = {}
        for row, code in enumerate(support.items.tolist()):
            review = "" if side.reviews is None else clean_field(str(side.reviews[row]), special_tokens)
            said = "; ".join(part for part in (review, _said(_at(side.rated, row), special_tokens)) if part)
            if said:
                found[code] = f" ({said})"
        return found


def _said(fields: Mapping[str, str], special_tokens: Sequence[str]) -> str:
    """Returns fields and values as words; a sentence about oneself stands for itself, unknown values are left out."""
    known = {name: clean_field(str(value), special_tokens) for name, value in fields.items()}
    named = [
        f"{clean_field(name, special_tokens)}: {value}" for name, value in known.items() if value and name != ABOUT
    ]
    return "; ".join([*([known[ABOUT].rstrip(".")] if known.get(ABOUT) else []), *named])


def _at(moments: Mapping[str, Texts], row: int) -> dict[str, str]:
    """Returns the moment of one row; one that is the same for all rows stands once."""
    return {name: column[row if len(column) > 1 else 0] for name, column in moments.items() if len(column)}


@dataclass(frozen=True)
class InContext:
    """Scores a candidate by the log-odds of the yes word after the user's history and the candidate's prompt.

    Args:
        backbone: The model. A masked LM fills the candidate's blank, an encoder compares with the two answers, a
            classifier gives the log-odds of its classes.
        history: Writes a user's ratings into the prompt.
        calibrated: Subtracts the log-odds of a candidate without content under the same history (Zhao et al. 2021);
            the order of one user's candidates does not change.
        name: How the method is called in tables.
        bytes_per_user: See `Scorer`.

    Raises:
        ConfigError: The model is a masked LM, and the prompt has no blank.

    Source: Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.
    """

    backbone: Backbone
    history: History
    calibrated: bool = False
    name: str = "in-context prompt"
    bytes_per_user: int = 0

    def __post_init__(self) -> None:
        if self.backbone.kind == "masked" and not self.history.template.has_blank:
            raise ConfigError(
                f"the prompt leaves '{self.backbone.name}' no blank to fill in", "Put {{ mask }} where the answer goes"
            )

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_one_by_one(self.name, requests, len(self.history.catalog), self.log_odds)

    def log_odds(self, request: Request) -> Tensor:
        """Returns log p(yes) - log p(no) of every candidate, differentiable, shape (candidates,)."""
        items, first, place = np.unique(request.candidates, return_index=True, return_inverse=True)
        odds = self._odds(self._texts(request.support, items, first))
        if self.calibrated and len(items):
            odds = odds[:-1] - odds[-1]
        return odds[torch.from_numpy(place).to(odds.device)]

    def class_logits(self, request: Request) -> Tensor:
        """Returns a classifier's logits of every candidate, differentiable, shape (candidates, classes)."""
        rows = np.arange(len(request.candidates))
        states = read_texts(self.backbone, self._texts(request.support, request.candidates, rows))
        return self.backbone.class_logits(states)

    def states(self, items: Codes) -> Tensor:
        """Returns the states behind the answers about some items without a history, shape (items, hidden)."""
        texts = [self._question(int(code)) for code in items]
        return last_states(self.backbone, texts) if self.backbone.kind == "causal" else read_texts(self.backbone, texts)

    def _odds(self, texts: Sequence[str]) -> Tensor:
        if self.backbone.kind != "causal":
            template = self.history.template
            return text_log_odds(self.backbone, texts, template.positive, template.negative)
        logits = self.backbone.word_logits(last_states(self.backbone, texts), self._answers)
        return logits[:, 0] - logits[:, 1]

    def prompt_text(self, request: Request, candidate: int) -> str:
        """Returns the text that is read to score a candidate."""
        rows = np.flatnonzero(request.candidates == candidate)[:1]
        return self._texts(request.support, np.array([candidate]), rows if len(rows) else np.zeros(1, np.int64))[0]

    def tokens_read(self, request: Request) -> int:
        """Returns the number of tokens that scoring a request reads; tokens that its prompts share count once."""
        return count_tokens(
            self.backbone, self._texts(request.support, *np.unique(request.candidates, return_index=True))
        )

    def _texts(self, support: Ratings, items: Codes, rows: Codes) -> list[str]:
        """Returns the prompt of every item; if calibrated, the last one is a prompt without content.

        Args:
            support: The user's ratings.
            items: The items.
            rows: The place of each among those that are asked about, whose moments may differ.
        """
        special, history = self.backbone.special_tokens, self.history
        moments = [history.moment(support.side, int(row), special) for row in rows]
        questions = [moment + self._question(int(code)) for moment, code in zip(moments, items, strict=True)]
        if self.calibrated and questions:
            blank = content_free(history.catalog)
            questions.append(moments[0] + history.template.render(blank, 0, special, self._mask))
        start = self._fitting([history.person(support.side, special), *history.texts(support, special)], questions)
        return [start + question for question in questions]

    def _fitting(self, examples: Sequence[str], questions: Sequence[str]) -> str:
        """Returns a history as text; of a model that sees in both directions, the parts that it has places for.

        Such models have few positions. Of a causal LM, a history that is too long is refused when it is read.
        """
        limit = self.backbone.max_tokens
        if self.backbone.kind == "causal" or limit is None or not questions or not examples:
            return "".join(examples)
        asked = max(map(len, self.backbone.tokenize(questions)))
        lengths = [len(ids) for ids in self.backbone.tokenize(examples)]
        kept = next(
            first
            for first in range(len(examples) + 1)
            if asked + sum(lengths[first:]) <= limit or first == len(examples)
        )
        return "".join(examples[kept:])

    def _question(self, code: int) -> str:
        return self.history.template.render(self.history.catalog, code, self.backbone.special_tokens, self._mask)

    @property
    def _mask(self) -> str:
        return str(self.backbone.tokenizer.mask_token) if self.backbone.kind == "masked" else ""

    @cached_property
    def _answers(self) -> tuple[int, int]:
        template = self.history.template
        question = self._question(0)
        return (
            self.backbone.answer_token(question, template.positive),
            self.backbone.answer_token(question, template.negative),
        )


def _tokens(backbone: Backbone, texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Returns texts' tokens and how many leading ones a causal LM reads once, less than the shortest text has."""
    tokens = backbone.tokenize(texts) if texts else []
    if backbone.kind != "causal":
        return tokens, 0
    return tokens, min(common_start([*map(tuple, tokens)]), min(map(len, tokens)) - 1) if tokens else 0


def last_states(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Returns the state of each text's last token, shape (texts, hidden); a start that they share is read once."""
    return backbone.last_states(*_tokens(backbone, texts))


def count_tokens(backbone: Backbone, texts: Sequence[str]) -> int:
    """Returns the number of tokens that texts have; a start that they share counts once."""
    tokens, shared = _tokens(backbone, texts)
    return shared + sum(len(ids) - shared for ids in tokens)


def score_one_by_one(
    name: str, requests: Sequence[Request], items: int, values: Callable[[Request], Tensor]
) -> list[Tensor]:
    """Scores requests one after another, with a progress bar if it takes long.

    Args:
        name: Text of the progress bar.
        requests: The requests.
        items: Number of items that the method was fitted on.
        values: Scores of one request's candidates.

    Raises:
        UnknownItemError: See `check_codes`.
    """
    check_codes(requests, items)
    scores = []
    with torch.no_grad(), progress(name, len(requests), after=2.0) as advance:
        for done, request in enumerate(requests, start=1):
            scores.append(values(request).float().cpu())
            advance(done)
    return scores
