"""Item text and answer words: the prompt is a Jinja2 template, the answers are single tokens found at its end.

Item fields are cleaned before they enter a prompt: control characters and texts that a tokenizer would read as its
own control tokens become spaces, so that no title can end a turn or add one. Knows nothing of users, scores or layers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from metarec.artifacts import content_hash
from metarec.backbone import Backbone
from metarec.errors import ConfigError
from metarec.interactions import Catalog, article_first

MAX_FIELD_CHARACTERS = 300
_USUAL_FIELDS = ("year", "genres", "authors")
FIELDS_AFTER_TITLE = (
    "{% if year %} ({{ year }}){% endif %}{% for field in [genres, authors] if field %}, {{ field }}{% endfor %}"
)
# For whatever people review; it goes on as reviews do.
REVIEW = 'Review: "{{ title }}"' + FIELDS_AFTER_TITLE + ". It was received by critics and audiences as"


@dataclass(frozen=True)
class PromptTemplate:
    """The text that describes one item and asks for an answer.

    Args:
        text: Jinja2 template over the catalog's fields, and ``mask`` where the model fills in a blank.
        positive: The answer word that counts for the item.
        negative: The answer word that counts against it.
    """

    text: str
    positive: str
    negative: str

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _compile(self.text, "prompt.text")

    def render(self, catalog: Catalog, code: int, special_tokens: Sequence[str] = (), mask: str = "") -> str:
        """Returns the prompt of one item.

        Args:
            catalog: Where its fields are.
            code: The item.
            special_tokens: The tokenizer's control texts, removed from the fields.
            mask: What ``{{ mask }}`` stands for.

        Raises:
            ConfigError: The template names a field that the catalog does not have, or fails.
        """
        fields = {**_cleaned(catalog, code, special_tokens), "mask": mask}
        return _render(self._compiled, fields, "the prompt template", catalog.ids[code])


def described(catalog: Catalog) -> Catalog:
    """Returns the catalog with blanks for what is usually known of items and not of these."""
    return Catalog(catalog.ids, {**{name: ("",) * len(catalog) for name in _USUAL_FIELDS}, **catalog.fields})


def recall_texts(catalog: Catalog, sentence: str = REVIEW, special_tokens: Sequence[str] = ()) -> list[str]:
    """Renders, for every item, a sentence that goes on with what is known of it.

    Titles are written as in a text, ``The Matrix`` for ``Matrix, The``.

    Args:
        catalog: The items.
        sentence: Jinja2 template over the catalog's fields, of which `described` gives the usual ones.
        special_tokens: The tokenizer's control texts, removed from the fields.

    Raises:
        ConfigError: The template does not parse, names a field that is not there, or fails.
    """
    compiled = _compile(sentence, "prompt.recall")
    titles = tuple(map(article_first, catalog.fields["title"]))
    named = Catalog(catalog.ids, {**described(catalog).fields, "title": titles})
    return [
        _render(compiled, _cleaned(named, code, special_tokens), "a template of 'prompt.recall'", catalog.ids[code])
        for code in range(len(named))
    ]


def derive_fields(catalog: Catalog, templates: Mapping[str, str]) -> Catalog:
    """Builds catalog fields from others: item text as a task wants it, or the value that names a domain.

    Args:
        catalog: The items.
        templates: Name of a new or replaced field to its Jinja2 template over the fields before it.

    Raises:
        ConfigError: A template does not parse, names a field that is not there, or fails.
    """
    for name, text in templates.items():
        compiled = _compile(text, f"dataset.fields.{name}")
        column = tuple(
            _render(compiled, catalog.row(code), f"the template of field '{name}'", catalog.ids[code]).strip()
            for code in range(len(catalog))
        )
        catalog = Catalog(catalog.ids, {**catalog.fields, name: column})
    return catalog


def _compile(text: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the template does not parse: {error}", f"Repair '{where}'") from None


def _render(template: jinja2.Template, fields: Mapping[str, str], what: str, item: str) -> str:
    try:
        return template.render(**fields)
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{what} fails on item '{item}': {error}", f"Fields there are: {', '.join(sorted(set(fields) - {'mask'}))}"
        ) from None


def _cleaned(catalog: Catalog, code: int, special_tokens: Sequence[str]) -> dict[str, str]:
    return {name: clean_field(value, special_tokens) for name, value in catalog.row(code).items()}


def clean_field(value: str, special_tokens: Sequence[str] = ()) -> str:
    """Returns a field's text without control characters or control tokens, on one line, of bounded length."""
    visible = "".join(" " if unicodedata.category(char).startswith("C") else char for char in value)
    for token in special_tokens:
        visible = visible.replace(token, " ")
    return " ".join(visible.split())[:MAX_FIELD_CHARACTERS]


@dataclass(frozen=True)
class CatalogPrompts:
    """Every item's prompt as token ids, and what all prompts share.

    Args:
        texts: Prompt per item.
        tokens: Token ids per item.
        prefix: How many leading tokens all prompts have in common.
        suffix: How many trailing tokens all prompts have in common, beyond the prefix.
        answers: Token ids of the yes and the no word; None for encoders.
        mask_token: Token id of the blank to fill in; None where the answer follows the prompt.
        answer_texts: The two texts an encoder compares items with.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    prefix: int
    suffix: int
    answers: tuple[int, int] | None
    mask_token: int | None
    answer_texts: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def digest(self) -> str:
        """Names the prompts by their content."""
        return content_hash([self.tokens, self.answers, self.answer_texts])


def content_free(catalog: Catalog) -> Catalog:
    """Returns a catalog of one item of which nothing is known: every field says ``N/A``.

    Source: Zhao et al. 2021, "Calibrate Before Use", section 5.
    """
    return Catalog(("N/A",), dict.fromkeys(catalog.fields, ("N/A",)))


def tokenize_catalog(backbone: Backbone, template: PromptTemplate, catalog: Catalog) -> CatalogPrompts:
    """Renders and tokenizes every item's prompt.

    Raises:
        ConfigError: A masked LM's template has no ``{{ mask }}``.
        BackboneError: An answer word is not one token.
    """
    mask = backbone.tokenizer.mask_token if backbone.kind == "masked" else ""
    special = backbone.special_tokens
    texts = [template.render(catalog, code, special, mask) for code in range(len(catalog))]
    if backbone.kind == "masked" and mask not in texts[0]:
        raise ConfigError(
            f"the prompt leaves '{backbone.name}' no blank to fill in", "Put {{ mask }} where the answer goes"
        )
    tokens = tuple(map(tuple, backbone.tokenize(texts)))
    answers = None
    if backbone.kind != "encoder":
        answers = (
            backbone.answer_token(texts[0], template.positive),
            backbone.answer_token(texts[0], template.negative),
        )
    shortest = min(map(len, tokens))
    prefix = min(common_start(tokens), shortest - 1)
    suffix = min(common_start([ids[::-1] for ids in tokens]), shortest - prefix)
    yes_text, no_text = backbone.tokenize([template.positive, template.negative])
    return CatalogPrompts(
        texts=tuple(texts),
        tokens=tokens,
        prefix=prefix,
        suffix=suffix,
        answers=answers,
        mask_token=backbone.tokenizer.mask_token_id if backbone.kind == "masked" else None,
        answer_texts=(tuple(yes_text), tuple(no_text)),
    )


def common_start(sequences: Sequence[tuple[int, ...]]) -> int:
    """Returns how many leading numbers all sequences have in common."""
    # The least and the greatest sequence differ wherever any two do.
    least, greatest = min(sequences), max(sequences)
    differ = (place for place, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b)
    return next(differ, min(len(least), len(greatest)))
