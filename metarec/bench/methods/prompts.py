"""Methods that ask the frozen language model: zero-shot, and with the user's history in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metarec.bench.context import LANGUAGE_MODEL, Method, MethodContext, MethodRow

if TYPE_CHECKING:
    from metarec.scorers.language.finetuned import FineTuned
    from metarec.scorers.language.in_context import InContext
    from metarec.scorers.language.listwise import Listwise
    from metarec.scorers.language.zero_shot import ZeroShot


def prompted(scorer: ZeroShot | InContext | Listwise | FineTuned, *, log_odds: bool = False) -> MethodRow:
    """Returns the row of a scorer that says itself what it reads."""
    from metarec.scorers.language.finetuned import FineTuned

    parameters = scorer.parameters if isinstance(scorer, FineTuned) else 0
    return MethodRow(scorer, parameters, scorer.tokens_read, scorer.prompt_text, log_odds)


def _zero_shot(context: MethodContext) -> Sequence[MethodRow]:
    from metarec.scorers.language.zero_shot import ZeroShot, calibrated_zero_shot

    model = context.answer_model
    calibrated = calibrated_zero_shot(model, context.data.task.template, context.interactions.catalog)
    return [prompted(scorer, log_odds=True) for scorer in (ZeroShot(model), calibrated)]


def _in_context(context: MethodContext, *, limit: int) -> Sequence[MethodRow]:
    from metarec.scorers.language.in_context import InContext

    backbone, history = context.backbone, context.history(limit)
    calibrated = InContext(backbone, history, calibrated=True, name="in-context, calibrated")
    return [prompted(scorer, log_odds=True) for scorer in (InContext(backbone, history), calibrated)]


def _listwise(context: MethodContext, *, limit: int, rounds: int) -> Sequence[MethodRow]:
    from metarec.scorers.language.listwise import Listwise

    return [prompted(Listwise(context.backbone, context.history(limit), rounds=rounds))]


PROMPTS = {
    "zero-shot prompt": Method(
        _zero_shot, "prompt", "the frozen model's answer, the same for every user; also calibrated", {}, LANGUAGE_MODEL
    ),
    "in-context prompt": Method(
        _in_context, "prompt", "the user's history in the prompt; also calibrated", {"limit": 16}, LANGUAGE_MODEL
    ),
    "in-context, listwise": Method(
        _listwise,
        "prompt",
        "history and a lettered list of candidates, shuffled",
        {"limit": 8, "rounds": 4},
        LANGUAGE_MODEL,
    ),
}
