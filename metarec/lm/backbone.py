"""Runs frozen language models: causal LMs, masked LMs and text encoders behind one type, `Backbone`.

`metarec.lm.loading` opens them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from metarec.errors import BackboneError
from metarec.lm.families import BlockModel, TakenApart, take_apart
from metarec.lm.logits import LogitRule, logit_rule, row_products
from metarec.lm.pooling import Pooling
from metarec.lm.rating_classes import RatingClasses
from metarec.lm.whole_model import Kind, transformers_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Texts that are read side by side; more need memory for each one's copy of what they share.
_TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Backbone:
    """A frozen language model and its tokenizer.

    Args:
        name: How it was asked for: an embedded name, a Hugging Face name, or a directory.
        kind: ``causal`` and ``masked`` models score by answer words; an ``encoder`` by its pooled state, a
            ``classifier`` by its classes, which stand for ratings.
        fingerprint: See `metarec.lm.fingerprint`; part of every cache key and checkpoint.
        location: What PEFT should know as the base model: the directory or name it was loaded from.
        modules: The model's modules with its frozen weights: transformers' own, in evaluation mode, or those of
            `metarec.lm.plain_llama`, which have the same names.
        open_tokenizer: Returns its tokenizer.
        open_model: Returns the transformers model; None where `modules` are its own.
        pooling: How an encoder makes one state of a text's tokens; see `metarec.lm.pooling`.
    """

    name: str
    kind: Kind
    fingerprint: str
    location: str
    modules: Any
    open_tokenizer: Callable[[], PreTrainedTokenizerBase]
    open_model: Callable[[], PreTrainedModel] | None = None
    pooling: Pooling = "mean"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; opened when it is first asked for where a saved recommender brings its prompts as tokens."""
        return self.open_tokenizer()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The transformers model, which runs whole; opened when it is first asked for, see `modules`."""
        model: PreTrainedModel = self.modules if self.open_model is None else self.open_model()
        return model

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.modules.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights."""
        found: torch.dtype = next(self.modules.parameters()).dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where the frozen weights are."""
        found: torch.device = next(self.modules.parameters()).device
        return found

    @property
    def readers(self) -> int:
        """How many blocks of items are read side by side: one per thread, or one on an accelerator."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    @property
    def task_type(self) -> str | None:
        """PEFT's word for the kind of model; it has none for masked models and encoders."""
        return "CAUSAL_LM" if self.kind == "causal" else None

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer would read as control tokens; item text must not contain them."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return tuple(sorted({*self.tokenizer.all_special_tokens, *added}, key=len, reverse=True))

    @property
    def max_tokens(self) -> int | None:
        """How many tokens the model has positions for; None where nothing limits them."""
        limit = getattr(self.modules.config, "max_position_embeddings", None)
        rotary = getattr(self.modules.config, "rope_parameters", None) or {}
        if limit is None or limit < 1 or rotary.get("rope_type") == "dynamic":
            return None
        embeddings = getattr(getattr(self.modules.base_model, "embeddings", None), "position_embeddings", None)
        # RoBERTa counts positions from behind the one of its padding.
        before = getattr(embeddings, "padding_idx", None)
        return int(limit) - (0 if before is None else before + 1)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns token ids, with the tokenizer's own start and end tokens where the model was trained with them."""
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=True)["input_ids"]]

    def answer_token(self, prompt: str, word: str) -> int:
        """Finds the token that answers `prompt` with `word`, at the real boundary between the two.

        Raises:
            BackboneError: The word is not exactly one token there.
        """
        if self.kind == "masked":
            ids = list(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        else:
            before, after = self.tokenize([prompt, prompt + word])
            ids = after[len(before) :] if after[: len(before)] == before else []
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            pieces = self.tokenizer.convert_ids_to_tokens(ids) if ids else "merged with the prompt's end"
            raise BackboneError(
                f"answer word {word!r} is not one token of '{self.name}' after the prompt ({pieces})",
                "Choose a shorter word, or move a space between the prompt's end and the word",
            )
        return int(ids[0])

    @cached_property
    def logit_rule(self) -> LogitRule:
        """What the model does to its vocabulary head's products."""
        return logit_rule(self.modules.config)

    def answer_direction(self, yes: int, no: int) -> tuple[Tensor, Tensor]:
        """Returns the vector and the offset whose product with the last state is log p(yes) - log p(no).

        A model that caps its logits has none: see `word_logits`.
        """
        head = self.modules.get_output_embeddings()
        weight = head.weight.detach()
        bias = getattr(head, "bias", None)
        offset = torch.zeros(()) if bias is None else (bias[yes] - bias[no]).detach()
        precise = _at_least_float32(weight.dtype)
        scale = self.logit_rule.scale
        return (weight[yes].to(precise) - weight[no].to(precise)) * scale, offset.to(precise) * scale

    def word_logits(self, states: Tensor, words: Sequence[int]) -> Tensor:
        """Returns the vocabulary head's logits of some tokens; gradients go through the head too.

        Args:
            states: What the head multiplies, shape (..., hidden).
            words: Token ids.

        Returns:
            Shape (..., words).
        """
        head = self.modules.get_output_embeddings()
        precise = _at_least_float32(head.weight.dtype)
        rows = list(words)
        bias = getattr(head, "bias", None)
        products = row_products(states.to(precise), head.weight[rows].to(precise))
        return self.logit_rule(products if bias is None else products + bias[rows].to(precise))

    def class_logits(self, states: Tensor) -> Tensor:
        """Returns a classifier's logits, shape (..., classes), of what its last layer multiplies, (..., hidden)."""
        head = self.output_head()
        precise = _at_least_float32(head.weight.dtype)
        products = row_products(states.to(precise), head.weight.to(precise))
        return products if head.bias is None else products + head.bias.to(precise)

    def class_answer(self, states: Tensor) -> Tensor:
        """Returns what a classifier's classes say of what its last layer multiplies, shape (...)."""
        return self.classes.answer(self.class_logits(states))

    def last_states(self, texts: Sequence[Sequence[int]], shared: int) -> Tensor:
        """Reads texts that begin alike with the whole model, what they share once only; differentiable.

        Args:
            texts: Token ids; each text is longer than `shared`.
            shared: How many leading tokens all texts have in common.

        Returns:
            What the vocabulary head multiplies at every text's last token, shape (texts, hidden).

        Raises:
            BackboneError: The model is not a causal LM, or a text is longer than it can read.
        """
        if self.kind != "causal":
            raise BackboneError(f"'{self.name}' does not read left to right", "Choose a causal LM")
        longest, limit = max(map(len, texts), default=0), self.max_tokens
        if limit is not None and longest > limit:
            raise BackboneError(
                f"a prompt has {longest} tokens, '{self.name}' reads {limit}", "Shorten the prompt or its history"
            )
        past = self._key_values(texts[0][:shared]) if shared and texts else ()
        states: dict[int, Tensor] = {}
        # Texts of like length side by side need little padding; what follows a text's last token it cannot see.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            block = order[start : start + _TEXTS_AT_ONCE]
            own = [list(texts[place][shared:]) for place in block]
            width = max(map(len, own))
            tokens = torch.tensor([ids + [ids[-1]] * (width - len(ids)) for ids in own], device=self.device)
            hidden = self._read(tokens, past)[0]
            states |= {place: hidden[row, len(own[row]) - 1] for row, place in enumerate(block)}
        if not states:
            return torch.zeros(0, self.hidden_size, dtype=self.dtype, device=self.device)
        return torch.stack([states[place] for place in range(len(texts))])

    def _key_values(self, tokens: Sequence[int]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Returns every layer's keys and values of one text, as attention keeps them."""
        cache = self._read(torch.tensor([list(tokens)], device=self.device), ())[1]
        return tuple((layer.keys, layer.values) for layer in cache.layers)

    def _read(self, tokens: Tensor, past: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Any]:
        """Reads rows of tokens after a past that all share; returns their last hidden states and the filled cache."""
        cache = transformers_package().DynamicCache()
        for layer, pair in enumerate(past):
            keys, values = (part.expand(len(tokens), -1, -1, -1) for part in pair)
            cache.update(keys, values, layer)
        output = self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return output.last_hidden_state, output.past_key_values

    @cached_property
    def classes(self) -> RatingClasses:
        """What the classes of a classifier stand for.

        Raises:
            BackboneError: The model is no classifier of ratings.
        """
        found = RatingClasses.of_config(self.modules.config)
        if self.kind != "classifier" or found is None:
            raise BackboneError(f"'{self.name}' has no classes that stand for ratings", "Run metarec finetune")
        return found

    def output_head(self) -> torch.nn.Linear:
        """Returns the last layer: of a classifier the one that gives a number per class, else the vocabulary's."""
        if self.kind != "classifier":
            return cast("torch.nn.Linear", self.model.get_output_embeddings())
        outside = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and not name.startswith(f"{self.model.base_model_prefix}.")
        ]
        if not outside:
            raise BackboneError(f"'{self.name}' has no layer for its classes", "Choose another model")
        return outside[-1]

    def before_any_head(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Runs a whole masked LM or classifier of any architecture and returns what its last layer multiplies.

        Args:
            inputs: What the model takes, such as ``input_ids`` and ``attention_mask``, shape (rows, tokens).

        Returns:
            Shape (rows, tokens, hidden); (rows, hidden) of a classifier that reads one token alone.
        """
        caught: list[Tensor] = []
        head = self.output_head()
        hook = head.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
        try:
            self.model(**inputs)
        finally:
            hook.remove()
        return caught[0]

    @cached_property
    def taken_apart(self) -> TakenApart:
        """The model taken apart by the first family that recognises it, or why it is not."""
        return take_apart(self.modules, self.kind)

    @property
    def weights(self) -> BlockModel | None:
        """The model's blocks, or None where it is run whole."""
        return self.taken_apart.blocks

    @property
    def summary(self) -> str:
        """Kind, layers, context length, and what runs the model: its family's blocks, or transformers and why."""
        found = self.taken_apart
        path = f"through transformers itself, which is slower: {found.why_not}"
        if found.blocks is not None:
            path = f"fast path by family {found.family}"
        context = "no limit of positions" if self.max_tokens is None else f"{self.max_tokens} positions"
        return f"{self.kind}, {self.modules.config.num_hidden_layers} layers, {context}; {path}"

    @cached_property
    def layer_path(self) -> str:
        """Module path of the list of blocks, found as the only module list of the right length.

        Raises:
            BackboneError: There is no such list, or there are several.
        """
        found = [
            name
            for name, module in self.modules.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.modules.config.num_hidden_layers
        ]
        if len(found) != 1:
            raise BackboneError(f"the blocks of '{self.name}' cannot be found among its modules ({found})")
        return str(found[0])


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
