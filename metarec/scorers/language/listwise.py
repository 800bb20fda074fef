"""In-context recommendation by lists: the prompt lists candidates by letter and asks which one the user likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metarec.data.interactions import Codes, Ratings
from metarec.data.templates import clean_field
from metarec.errors import ConfigError, UnknownItemError
from metarec.lm.backbone import Backbone
from metarec.scorer import Request
from metarec.scorers.language.in_context import History, count_tokens, last_states, score_one_by_one

_QUESTION = "Which one of these does the same person like best?"
_ANSWER = "Answer:"


@dataclass(frozen=True)
class Listwise:
    """Scores candidates by prompts that list some of them by letter and ask which one the user likes best.

    A score is the log-probability of the candidate's letter among the letters of its list, relative to chance, averaged
    over several shuffles into lists, because a model prefers some letters and some positions (Zheng et al. 2024). A
    candidate's score depends on the other candidates in its lists. Candidates of one title are one line and have one
    score.

    Args:
        backbone: A causal LM.
        history: Writes a user's ratings into the prompt.
        rounds: Shuffles to average over; a shuffle is a function of the seed and of the candidates' ids.
        labels: Letters of a list's lines; their number is the greatest length of a list.
        name: How the method is called in tables.
        bytes_per_user: See `Scorer`.

    Raises:
        ConfigError: The model is not a causal LM, or there are no rounds or fewer than two labels.

    Source: Hou et al. 2024, "Large Language Models are Zero-Shot Rankers for Recommender Systems", for shuffling and
    averaging.
    """

    backbone: Backbone
    history: History
    rounds: int = 4
    labels: tuple[str, ...] = tuple("ABCDEFGHIJ")
    name: str = "in-context, listwise"
    bytes_per_user: int = 0

    def __post_init__(self) -> None:
        _need_causal(self.backbone)
        if self.rounds < 1 or len(self.labels) < 2:
            raise ConfigError(f"{self.rounds} rounds over lists of {len(self.labels)}", "Choose 1 and 2 or more")

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        return score_one_by_one(self.name, requests, len(self.history.catalog), self._score)

    def prompt_text(self, request: Request, candidate: int) -> str:
        """Returns the text of the first list that contains a candidate.

        Raises:
            UnknownItemError: The item is not one of the request's candidates.
        """
        if candidate not in request.candidates:
            raise UnknownItemError(
                f"item code {candidate} is not one of the request's candidates", "A list shows these alone"
            )
        items, place = self._lines(request.candidates)
        line = items[place[request.candidates == candidate][0]]
        shown = next(shown for shown in self._lists(items) if line in shown)
        return self._text(self._history(request.support), shown)

    def tokens_read(self, request: Request) -> int:
        """Returns the number of tokens that scoring a request reads; tokens that its prompts share count once."""
        history = self._history(request.support)
        lists = self._lists(self._lines(request.candidates)[0])
        return count_tokens(self.backbone, [self._text(history, shown) for shown in lists])

    def _score(self, request: Request) -> Tensor:
        items, place = self._lines(request.candidates)
        history = self._history(request.support)
        lists = self._lists(items)
        states = last_states(self.backbone, [self._text(history, shown) for shown in lists])
        total = torch.zeros(len(items))
        for shown, logits in zip(lists, self.backbone.word_logits(states, self._answers).cpu(), strict=True):
            relative = logits[: len(shown)].log_softmax(0) + np.log(len(shown))
            total[torch.from_numpy(np.searchsorted(items, shown))] += relative.float() / self.rounds
        return total[torch.from_numpy(place)]

    def _history(self, support: Ratings) -> str:
        """Returns the text before the lists; a moment is said if it is the same for all candidates."""
        special, side = self.backbone.special_tokens, support.side
        same = (
            {} if side is None else {name: one[:1] for name, one in side.asked.items() if len(set(one.tolist())) == 1}
        )
        now = "" if side is None else self.history.moment(side.asking(same), 0, special)
        return self.history.text(support, special) + now

    def _lines(self, candidates: Codes) -> tuple[Codes, Codes]:
        """Returns the first item of every title, in the order of codes, and the index of each candidate's title."""
        first: dict[str, int] = {}
        for code in np.unique(candidates):
            first.setdefault(self._title(code), int(code))
        items = np.array([*first.values()], np.int64)
        return items, np.searchsorted(items, [first[self._title(code)] for code in candidates])

    def _title(self, code: int) -> str:
        return clean_field(self.history.catalog.title(int(code)), self.backbone.special_tokens)

    def _lists(self, items: Codes) -> list[Codes]:
        """Returns the lists of all rounds; lengths within a round differ by one at most."""
        count = -(-len(items) // len(self.labels))
        lists: list[Codes] = []
        for number in range(self.rounds if count else 0):
            order = sorted(range(len(items)), key=lambda row: self.history.rank(int(items[row]), str(number)))
            lists += np.array_split(items[order], count)
        return lists

    def _text(self, history: str, shown: Codes) -> str:
        lines = [f"{label}. {self._title(code)}" for label, code in zip(self.labels, shown, strict=False)]
        return history + "\n".join([_QUESTION, *lines, _ANSWER])

    @cached_property
    def _answers(self) -> tuple[int, ...]:
        prompt = self._text("", np.zeros(1, np.int64))
        return tuple(self.backbone.answer_token(prompt, f" {label}") for label in self.labels)


def _need_causal(backbone: Backbone) -> None:
    if backbone.kind != "causal":
        raise ConfigError(
            f"'{backbone.name}' is of kind '{backbone.kind}', which does not read a history left to right",
            "Choose a causal LM",
        )
