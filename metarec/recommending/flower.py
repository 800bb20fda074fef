"""Federated meta-training through Flower: every client has its own users' ratings, and sends sums of clipped deltas.

The server sends the meta-parameters of a step; each client draws which of its users take part, lets them take the inner
steps, clips each one's delta and answers with the sum. The server adds up the sums, adds the noise, and goes on as
`metarec train` does. What is computed is what `metarec.meta.private` simulates in one process.

What clients read beside their ratings is a saved recommender, `prepare`d and not trained: the items, their prompts, and
the item means that standardize ratings. Sums reach the server as they are: there is no secure sum here.

Flower (Beutel et al. 2020, "Flower: A Friendly Federated Learning Research Framework") is installed apart, see
docs/finetuning.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from metarec.config import RunConfig
from metarec.data.interactions import Catalog, Interactions
from metarec.errors import ConfigError, DataError, TrainingError
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.meta.outer_loop import train
from metarec.meta.private import check_private, noised, statement, summed
from metarec.recommender import MetaRecommender
from metarec.scorers.term import ADAPTER_TERM, CrossFitted, TermContext
from metarec.training.fitting import Fitted, Prepared, calibrated
from metarec.training.meta_training import noise_generator, training_summary, user_deltas, validation_auc_of

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

# Terms that nothing is learned for from users' ratings.
_OF_NO_USERS = ("prompt", ADAPTER_TERM)
_COUNT, _DELTAS = "query.count", "train.deltas"
_META, _SUM, _STEP, _FACTS = "meta", "sum", "step", "facts"
# Seconds between two looks at how many clients there are.
_WAIT = 0.5
Load = Callable[[MetaRecommender, Mapping[str, Any]], "TaskData"]


@dataclass(frozen=True)
class Share:
    """What a client computes with: its own users' ratings, and what the server's start brings.

    Args:
        data: Its users are the meta-training users.
        prepared: The start.
        config: The start's settings.
        place: The client's number, by which its users' parts in a step are drawn.
    """

    data: TaskData
    prepared: Prepared
    config: RunConfig
    place: int

    def sum(self, meta: MetaState, step: int, rate: float) -> dict[str, Tensor]:
        """Returns the sum of the clipped deltas of those users who take part in a step, all that leaves the client."""
        deltas = user_deltas(self.data, self.prepared, self.config, meta, step, rate, self.place)
        return summed(meta, deltas, self.config.private.clip)


def share_of(start: MetaRecommender, data: TaskData, place: int) -> Share:
    """Returns what a client computes with.

    Args:
        start: The server's recommender, before meta-training.
        data: The client's; its meta-training users take part. Items that the start does not know are left out.
        place: The client's number.

    Raises:
        ConfigError: The score has terms that are fitted on all users' ratings.
        DataError: No rating is of an item that the start knows.
    """
    fitted = start.fitted
    check_score(start.config)
    own = replace(data, task=fitted.task, interactions=of_catalog(data.interactions, fitted.catalog), held_out=None)
    crossed = {name: CrossFitted(term) for name, term in fitted.terms.items()}
    context = cast("TermContext", _NoFolds(fitted.task.like_threshold))
    return Share(own, Prepared(fitted, crossed, context), start.config, place)


@dataclass(frozen=True)
class _NoFolds:
    """What meta-training reads of a `TermContext` where no term has folds."""

    threshold: float
    hidden: None = None


def check_score(config: RunConfig) -> None:
    """Refuses terms that are fitted on all users' ratings, which no client has.

    Raises:
        ConfigError: There are some.
    """
    others = [name for name in config.score if name not in _OF_NO_USERS]
    if others:
        raise ConfigError(
            f"score has '{others[0]}', which is fitted on all users' ratings, and no client has them",
            f"Set score=[{', '.join(_OF_NO_USERS)}]",
        )


def of_catalog(interactions: Interactions, catalog: Catalog) -> Interactions:
    """Returns ratings with the codes of another catalog; those of items that it does not have are left out.

    Raises:
        DataError: None is left.
    """
    if interactions.catalog.digest == catalog.digest:
        return interactions
    code = {item: place for place, item in enumerate(catalog.ids)}
    codes = np.array([code.get(item, -1) for item in interactions.catalog.ids], np.int64)[interactions.item]
    kept = interactions.subset(codes >= 0)
    if not len(kept):
        raise DataError("no rating is of an item that the server's start knows", "Name items as the server does")
    return replace(kept, item=codes[codes >= 0], catalog=catalog, item_vectors={})


def partition(start: MetaRecommender, node: Mapping[str, Any]) -> TaskData:
    """Returns a client's data by what Flower says of its node.

    Either ``task`` is the client's own task file, whose meta-training users take part; or the start's task is shared
    out, every ``num-partitions``-th meta-training user from ``partition-id`` on, as in a simulation.

    Raises:
        ConfigError: Neither is said.
    """
    from metarec.data.given_task import load_given, load_saved

    if "task" in node:
        return load_given(str(node["task"]), {}, start.config.seed)
    if "partition-id" not in node:
        raise ConfigError(
            "the node says neither 'task' nor 'partition-id'", "Start it with --node-config 'task=\"mine\"'"
        )
    data = load_saved(start.fitted.task, start.config.seed)
    users = data.parts["train"][int(node["partition-id"]) :: int(node["num-partitions"])]
    return replace(data, parts={**data.parts, "train": users})


def client_app(start: str | Path, load: Load = partition) -> Any:
    """Returns Flower's ``ClientApp``.

    Args:
        start: The directory of the recommender that the server starts from.
        load: Returns a client's data, from the start and the node's configuration.

    Raises:
        ConfigError: Flower is not installed.
    """
    _flower()
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    where = str(Path(start).absolute())

    def share(context: Any) -> Share:
        node = dict(context.node_config)
        place = int(node.get("partition-id", context.node_id % 2**32))
        return _opened_share(where, load, place, tuple(sorted(node.items())))

    def count(message: Any, context: Any) -> Any:
        users = len(share(context).data.parts["train"])
        return Message(RecordDict({_FACTS: MetricRecord({"users": users})}), reply_to=message)

    def deltas(message: Any, context: Any) -> Any:
        asked = message.content[_STEP]
        meta = MetaState.from_tensors(_tensors(message.content[_META]))
        found = share(context).sum(meta, int(asked["step"]), float(asked["rate"]))
        return Message(RecordDict({_SUM: _record(found)}), reply_to=message)

    app = ClientApp()
    app.query("count")(count)
    app.train("deltas")(deltas)
    return app


@cache  # of the process, for Flower sends an app's functions to those that run it
def _opened_share(start: str, load: Load, place: int, node: tuple[tuple[str, Any], ...]) -> Share:
    recommender = MetaRecommender.from_pretrained(start)
    return share_of(recommender, load(recommender, dict(node)), place)


def server_app(start: str | Path, out: str | Path, *, clients: int = 2, data: TaskData | None = None) -> Any:
    """Returns Flower's ``ServerApp``, which meta-trains and saves the recommender.

    Args:
        start: The directory of a recommender that is prepared and not trained.
        out: The directory to write.
        clients: How many clients it waits for; those that join later take no part.
        data: What the best step is chosen on; None takes the validation users of the start's task.

    Raises:
        ConfigError: Flower is not installed.
    """
    _flower()
    from flwr.serverapp import ServerApp

    def main(grid: Any, context: Any) -> None:
        recommender = MetaRecommender.from_pretrained(start)
        trained = federated(recommender, Clients(grid, clients), data or recommender.task_data(), Path(out))
        trained.save_pretrained(out)

    app = ServerApp()
    app.main()(main)
    return app


class Clients:
    """The clients of a Flower grid: what they say together.

    Args:
        grid: Flower's.
        count: How many to wait for.
    """

    def __init__(self, grid: Any, count: int) -> None:
        self._grid = grid
        self._nodes: list[int] = []
        while len(self._nodes) < count:
            self._nodes = sorted(grid.get_node_ids())
            if len(self._nodes) < count:
                time.sleep(_WAIT)

    def users(self) -> int:
        """Returns how many users they have together."""
        return sum(int(content[_FACTS]["users"]) for content in self._ask(_COUNT, {}))

    def sum(self, meta: MetaState, step: int, rate: float) -> dict[str, Tensor]:
        """Returns the sum of all clients' sums at a step."""
        from flwr.app import ConfigRecord

        asked = {_META: _record(meta.tensors()), _STEP: ConfigRecord({"step": step, "rate": rate})}
        total = {name: torch.zeros_like(value) for name, value in meta.tensors().items()}
        for content in self._ask(_DELTAS, asked):
            for name, value in _tensors(content[_SUM]).items():
                total[name] = total[name] + value.to(total[name])
        return total

    def _ask(self, what: str, content: Mapping[str, Any]) -> list[Any]:
        """Returns what all clients answer, in their order."""
        from flwr.app import Message, RecordDict

        sent = [Message(RecordDict(dict(content)), dst_node_id=node, message_type=what) for node in self._nodes]
        answers = list(self._grid.send_and_receive(sent))
        failed = [answer for answer in answers if answer.has_error()]
        if failed or len(answers) < len(sent):
            said = failed[0].error.reason if failed else "no answer"
            raise TrainingError(
                f"{len(sent) - len(answers) + len(failed)} of {len(sent)} clients failed: {said}",
                "Read the client's log; with a checkpoint the same command goes on",
            )
        return [answer.content for answer in sorted(answers, key=lambda answer: answer.metadata.src_node_id)]


def federated(start: MetaRecommender, clients: Clients, data: TaskData, out: Path) -> MetaRecommender:
    """Returns the start, meta-trained by what clients say.

    Args:
        start: Prepared and not trained; its settings hold throughout.
        clients: Have the meta-training users.
        data: Its validation users choose the best step.
        out: A checkpoint is kept beside it, and gone on from.

    Raises:
        ConfigError: The settings have terms that are fitted on all users, or are not those of private meta-training.
        TrainingError: A client failed.
    """
    fitted, config = start.fitted, start.config
    check_score(config)
    check_private(config.private, config.meta.algorithm, 1, config.train.replay)
    users = clients.users()
    rate = min(1.0, config.train.users / max(users, 1))

    def gradient_at(meta: MetaState, step: int) -> MetaGradient:
        total = clients.sum(meta, step, rate)
        return noised(total, config.private, rate * users, noise_generator(config.seed, step))

    trained = train(
        fitted.meta,
        gradient_at,
        lambda meta: validation_auc_of(data, replace(fitted, meta=meta), config),
        config.train,
        checkpoint=out.with_name(f"{out.name}-checkpoint"),
        identity={"start": start.digest, "users": users},
        resume=True,
        description="federated meta-training",
    )
    said = statement(trained.steps, rate, config.private)
    found: Fitted = replace(
        fitted, meta=trained.best, training={**fitted.training, **training_summary(trained), "privacy": said}
    )
    return MetaRecommender(start.backbone, config, calibrated(found, config, data))


def _record(tensors: Mapping[str, Tensor]) -> Any:
    """Returns tensors as Flower sends them."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in tensors.items()})


def _tensors(record: Any) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def _flower() -> Sequence[str]:
    try:
        import flwr
    except ImportError:
        raise ConfigError(
            "Flower is not installed",
            "Run: pip install 'metarec[flower]' in an environment of its own, without constraints.txt",
        ) from None
    return (str(flwr.__version__),)
