"""Kernels of items' texts, with controls: words and fields without a language model, and permuted texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from metarec.bench.context import ENCODER, LANGUAGE_MODEL, NO_SETTINGS, Method, MethodContext, MethodRow, one_row
from metarec.errors import ConfigError, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from metarec.data.interactions import Catalog, Codes, Interactions
    from metarec.data.task_data import TaskData
    from metarec.scorer import Request, Scorer
    from metarec.scorers.collaborative.gp import GaussianProcess
    from metarec.scorers.collaborative.residuals import Floats

# A method's name with this behind it is the method on a catalog whose texts were permuted.
PERMUTED = ", titles permuted"
# And with this and a block's name, the method on data that lack the block.
WITHOUT = ", without "
# All that is known of users and moments at once.
SIDE = "side information"


def _asked(context: MethodContext) -> dict[str, bool]:
    """Returns what the task's split says of the items that users are asked about."""
    return {"unrated": context.data.task.split.asks_unrated}


def _words(context: MethodContext) -> Floats:
    """Returns the words of every item's text, shape (items, width)."""
    from metarec.scorers.collaborative.features import word_vectors

    catalog, text = context.interactions.catalog, context.data.task.item_text
    return word_vectors([text.render(catalog, code) for code in range(len(catalog))])


def _projection(context: MethodContext, blocks: Sequence[Floats]) -> Floats:
    """Returns a projection of blocks of features that is learned from what users like together."""
    from metarec.scorers.collaborative.features import side_by_side
    from metarec.scorers.collaborative.projection import projected_features

    settings = context.config.collaborative.projection
    return projected_features(context.task_data, side_by_side(blocks), settings, context.seed)


def _words_kernel(
    context: MethodContext, *, fields: bool = False, projected: bool = False, **options: Any
) -> GaussianProcess:
    from metarec.scorers.collaborative.features import side_by_side
    from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel

    words = _words(context)
    beside = [_projection(context, [words])] if projected else []
    if fields:
        beside += context.fields.values()
    return fit_linear_kernel(
        context.interactions,
        context.users,
        side_by_side([words, *beside]) if beside else words,
        name=f"{'projected ' * projected}TF-IDF kernel{', + fields' * fields}",
        **_asked(context),
        **options,
    )


def _fields_kernel(context: MethodContext, **options: Any) -> GaussianProcess:
    import numpy as np

    from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel

    blocks = [np.zeros((len(context.interactions.catalog), 0)), *context.fields.values()]
    vectors = np.concatenate(blocks, 1)
    return fit_linear_kernel(
        context.interactions, context.users, vectors, name="fields kernel", **_asked(context), **options
    )


# The encoder's LoRA learned through users' posteriors alone.
_POSTERIOR = {"collaborative.tuning.steps": 0, "collaborative.tuning.posterior.steps": 200}


def _text_kernel(
    context: MethodContext,
    *,
    tuned: Literal["pairs", "posteriors"] | None = None,
    projected: bool = False,
    states: bool = False,
    **options: Any,
) -> GaussianProcess:
    from metarec.scorers.collaborative.features import side_by_side
    from metarec.scorers.collaborative.linear_kernel import fit_linear_kernel
    from metarec.scorers.language.encoder_tuning import tuned_text_vectors
    from metarec.training.task_features import language_model_vectors

    settings = context.configured(_POSTERIOR if tuned == "posteriors" else {}).collaborative
    blocks = [_words(context), context.vectors]
    if tuned:
        beside, linear = [*blocks, *context.fields.values()], settings.linear
        blocks.append(
            tuned_text_vectors(context.task_data, settings.encoder, settings.tuning, context.seed, beside, linear)
        )
    if states:
        blocks.append(language_model_vectors(context.answer_model, context.data))
    blocks += context.fields.values()
    if projected:
        # The projection stands for the vectors that it reads.
        blocks = [blocks[0], *context.fields.values(), _projection(context, blocks)]
    name = {None: "text kernel", "pairs": "tuned text kernel", "posteriors": "posterior-tuned text kernel"}[tuned]
    name = f"{'projected ' * projected}{name}{', + hidden states' * states}"
    return fit_linear_kernel(
        context.interactions, context.users, side_by_side(blocks), name=name, **_asked(context), **options
    )


def _other_items(items: int, seed: int) -> Codes:
    """Returns an order of the items that is a function of the seed."""
    from metarec.data.episodes import seeded

    return seeded(seed, "titles permuted").permutation(items)


def permuted_catalog(catalog: Catalog, seed: int) -> Catalog:
    """Returns the catalog with titles and all other fields moved together to other items, as a function of the seed."""
    order = _other_items(len(catalog), seed)
    return replace(catalog, fields={name: tuple(column[at] for at in order) for name, column in catalog.fields.items()})


def permuted_data(data: TaskData) -> TaskData:
    """Returns a task's data with permuted texts and vectors; who rated what, the split and the episodes stay."""
    catalog = permuted_catalog(data.interactions.catalog, data.seed)

    def moved(interactions: Interactions) -> Interactions:
        order = _other_items(len(catalog), data.seed)
        vectors = {name: some[order] for name, some in interactions.item_vectors.items()}
        return replace(interactions, catalog=catalog, item_vectors=vectors, vector_sources={})

    return replace(
        data,
        interactions=moved(data.interactions),
        held_out=None if data.held_out is None else moved(data.held_out),
    )


def without_block(data: TaskData, block: str) -> TaskData:
    """Returns a task's data that lack a field or vectors of items, a field of users, friends, or a column of moments.

    Raises:
        ConfigError: The data have no such block.
    """
    from metarec.data.side import SideColumns
    from metarec.data.side_files import FRIENDS

    whole = data.interactions
    side, catalog = whole.side, whole.catalog
    blocks = [*whole.item_vectors, *side.about, *side.moments, *(name for name in catalog.fields if name != "title")]
    blocks += [FRIENDS] * any(side.friends) + [SIDE] * bool(side)
    if block not in blocks:
        raise ConfigError(f"task '{data.task.name}' has no block '{block}'", suggest(block, blocks))

    def left(interactions: Interactions) -> Interactions:
        side = interactions.side
        fewer = SideColumns(
            {name: column for name, column in side.about.items() if name != block},
            () if block == FRIENDS else side.friends,
            {name: column for name, column in side.moments.items() if name != block},
            side.reviews,
        )
        columns = interactions.catalog.fields.items()
        # Blank, not away: a prompt may name the field.
        fields = {name: ("",) * len(column) if name == block else column for name, column in columns}
        return replace(
            interactions,
            catalog=replace(interactions.catalog, fields=fields),
            item_vectors={name: some for name, some in interactions.item_vectors.items() if name != block},
            side=SideColumns() if block == SIDE else fewer,
        )

    held_out = None if data.held_out is None else left(data.held_out)
    return replace(data, interactions=left(whole), held_out=held_out)


def asked_without(request: Request, block: str) -> Request:
    """Returns a request that lacks a field of its user, friends or a column of moments; see `without_block`."""
    from metarec.data.side_files import FRIENDS

    side = request.support.side
    if side is None:
        return request

    def left(columns: Mapping[str, Any]) -> dict[str, Any]:
        return {name: column for name, column in columns.items() if name != block}

    fewer = replace(
        side,
        about=left(side.about),
        friends=() if block == FRIENDS else side.friends,
        rated=left(side.rated),
        asked=left(side.asked),
    )
    return replace(request, support=replace(request.support, side=None if block == SIDE else fewer))


@dataclass(frozen=True)
class _Renamed:
    """A scorer under another name, asked by changed requests."""

    scorer: Scorer
    name: str
    asked: Callable[[Request], Request]

    @property
    def bytes_per_user(self) -> int:
        return self.scorer.bytes_per_user

    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        return self.scorer.score([self.asked(request) for request in requests])


def _as_asked(request: Request) -> Request:
    return request


def permuted(method: Method) -> Method:
    """Returns a method as a control: nothing that it reads of an item's text and fields is that item's.

    Whatever it gains over item means because texts say what people like is gone; what is left comes from ratings alone.
    """
    return _on_other_data(method, permuted_data, PERMUTED, "texts of other items")


def without(method: Method, block: str) -> Method:
    """Returns a method as an ablation: on data that lack one block; see `without_block`."""
    change, asked = partial(without_block, block=block), partial(asked_without, block=block)
    return _on_other_data(method, change, f"{WITHOUT}{block}", f"without {block}", asked)


def _on_other_data(
    method: Method,
    change: Callable[[TaskData], TaskData],
    suffix: str,
    said: str,
    asked: Callable[[Request], Request] = _as_asked,
) -> Method:
    """Returns a method that is fitted on changed data and asked by changed requests, its rows with a suffix."""

    def renamed(row: MethodRow, suffix: str) -> MethodRow:
        prompt = row.prompt
        return replace(
            row,
            scorer=_Renamed(row.scorer, f"{row.scorer.name}{suffix}", asked),
            tokens=lambda request: row.tokens(asked(request)),
            prompt=None if prompt is None else lambda request, candidate: prompt(asked(request), candidate),
        )

    def rows(context: MethodContext, **options: Any) -> Sequence[MethodRow]:
        moved = MethodContext(change(context.data), context.workspace, context.train_users, context.settings)
        return [renamed(row, suffix) for row in method.fit(moved, **options)]

    return replace(method, fit=rows, group="control", about=f"{said}: {method.about}"[:89])


_WORDS = Method(
    one_row(_words_kernel, lambda process: process.loadings.size),
    "control",
    "a kernel of the items' words (TF-IDF), its covariance learned from users",
    settings=NO_SETTINGS,
)
_PROJECTED_WORDS = Method(
    one_row(partial(_words_kernel, projected=True), lambda process: process.loadings.size),
    "control",
    "the TF-IDF kernel beside a projection of the words, learned from likes",
    settings=("collaborative.projection",),
)
_PROJECTED_TEXT = Method(
    one_row(partial(_text_kernel, projected=True), lambda process: process.loadings.size),
    "kernel",
    "the kernel of words and a projection of words and vectors, learned from likes",
    settings=(*ENCODER, "collaborative.projection"),
)
KERNELS = {
    "text kernel": Method(
        one_row(_text_kernel, lambda process: process.loadings.size),
        "kernel",
        "the TF-IDF kernel with fields and a frozen sentence encoder's vectors beside the words",
        settings=ENCODER,
    ),
    "tuned text kernel": Method(
        one_row(partial(_text_kernel, tuned="pairs"), lambda process: process.loadings.size),
        "kernel",
        "and vectors of that encoder with a LoRA learned from what users like together",
        settings=(*ENCODER, "collaborative.tuning"),
    ),
    "posterior-tuned text kernel": Method(
        one_row(partial(_text_kernel, tuned="posteriors"), lambda process: process.loadings.size),
        "kernel",
        "and vectors of that encoder with a LoRA learned through users' posteriors",
        settings=(*ENCODER, "collaborative.tuning"),
    ),
    "projected text kernel": _PROJECTED_TEXT,
    "projected text kernel, + hidden states": Method(
        one_row(partial(_text_kernel, projected=True, states=True), lambda process: process.loadings.size),
        "kernel",
        "and a causal language model's hidden states among what the projection reads",
        settings=(*ENCODER, *LANGUAGE_MODEL, "collaborative.projection"),
    ),
    # It reads an encoder, so that it is no control in the sense of the group.
    f"projected text kernel{PERMUTED}": replace(permuted(_PROJECTED_TEXT), group="kernel"),
    "projected tuned text kernel": Method(
        one_row(partial(_text_kernel, tuned="pairs", projected=True), lambda process: process.loadings.size),
        "kernel",
        "the projection over the vectors of the encoder with its LoRA as well",
        settings=(*ENCODER, "collaborative.tuning", "collaborative.projection"),
    ),
}
CONTROLS = {
    "TF-IDF kernel": _WORDS,
    "TF-IDF kernel, + fields": Method(
        one_row(partial(_words_kernel, fields=True), lambda process: process.loadings.size),
        "control",
        "the same of words and fields side by side: the text kernel without its encoder",
        settings=NO_SETTINGS,
    ),
    "projected TF-IDF kernel": _PROJECTED_WORDS,
    f"TF-IDF kernel{PERMUTED}": permuted(_WORDS),
    "fields kernel": Method(
        one_row(_fields_kernel, lambda process: process.loadings.size),
        "control",
        "the same kernel of the items' fields, without their text",
        settings=NO_SETTINGS,
    ),
}
