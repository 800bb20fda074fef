"""Item text: Jinja2 templates over a catalog's fields.

Item fields are cleaned before they enter a prompt: control characters and texts that a tokenizer would read as its
own control tokens become spaces, so that no title can end a turn or add one. Knows nothing of users, scores or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jinja2

from metarec.data.interactions import Catalog
from metarec.data.sandbox import BoundedTemplate, TemplateTooLarge, names_in, read_template
from metarec.data.text import visible
from metarec.data.titles import article_first
from metarec.errors import ConfigError

MAX_FIELD_CHARACTERS = 300
_USUAL_FIELDS = ("year", "genres", "authors")
_REVIEW = 'Review: "{lead}"{rest}. It was received by critics and audiences as'


@dataclass(frozen=True)
class PromptTemplate:
    """The text that describes one item and asks for an answer.

    Args:
        text: Jinja2 template over the catalog's fields, and ``mask`` where the model fills in a blank.
        positive: The answer word of a like.
        negative: The answer word that counts against it.
        where: The key of the task that says so.
        characters: How many characters of a field are read at most.
    """

    text: str
    positive: str
    negative: str
    where: str = "prompt.text"
    characters: int = MAX_FIELD_CHARACTERS

    @cached_property
    def _compiled(self) -> BoundedTemplate:
        return _compile(self.text, self.where)

    @cached_property
    def has_blank(self) -> bool:
        """Whether the answer fills a blank of the text instead of following it."""
        return "mask" in names_in(self.text)

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
        fields = {**_cleaned(catalog, code, special_tokens, self.characters), "mask": mask}
        return _render(self._compiled, fields, f"the template of '{self.where}'", catalog.ids[code])


def item_text(prompt: str) -> str:
    """Returns a template of what a prompt says of an item: the fields that it names, without the question around them.

    The title comes first, or the first field where no title is named; then the year, genres, authors and the others.

    Args:
        prompt: The prompt's template.

    Raises:
        ConfigError: It does not parse.
    """
    lead, rest = _lead_and_rest(prompt)
    return lead + rest


def review_sentence(prompt: str) -> str:
    """Returns a sentence for whatever people review, of the fields that a prompt names; it goes on as reviews do.

    Args:
        prompt: The prompt's template.

    Raises:
        ConfigError: It does not parse.
    """
    lead, rest = _lead_and_rest(prompt)
    return _REVIEW.format(lead=lead, rest=rest)


def _lead_and_rest(prompt: str) -> tuple[str, str]:
    _compile(prompt, "prompt.text")
    named = [name for name in names_in(prompt) if name not in ("mask", "id")]
    lead = "title" if "title" in named or not named else named[0]
    rest = [name for name in dict.fromkeys((*_USUAL_FIELDS, *named)) if name in named and name != lead]
    forms = {name: f" ({{{{ {name} }}}})" if name == "year" else f", {{{{ {name} }}}}" for name in rest}
    return f"{{{{ {lead} }}}}", "".join(f"{{% if {name} %}}{form}{{% endif %}}" for name, form in forms.items())


def described(catalog: Catalog) -> Catalog:
    """Returns the catalog with blanks for what is usually known of items and not of these."""
    return Catalog(catalog.ids, {**{name: ("",) * len(catalog) for name in _USUAL_FIELDS}, **catalog.fields})


def hidden_state_texts(
    catalog: Catalog, sentence: str, special_tokens: Sequence[str] = (), characters: int = MAX_FIELD_CHARACTERS
) -> list[str]:
    """Renders, for every item, a sentence that goes on with what is known of it.

    Titles are written as in a text, ``The Matrix`` for ``Matrix, The``.

    Args:
        catalog: The items.
        sentence: Jinja2 template over the catalog's fields, of which `described` gives the usual ones.
        special_tokens: The tokenizer's control texts, removed from the fields.
        characters: How many characters of a field are read at most.

    Raises:
        ConfigError: The template does not parse, names a field that is not there, or fails.
    """
    compiled = _compile(sentence, "prompt.hidden_states")
    titles = tuple(map(article_first, catalog.fields["title"]))
    named = Catalog(catalog.ids, {**described(catalog).fields, "title": titles})
    return [
        _render(
            compiled,
            _cleaned(named, code, special_tokens, characters),
            "a template of 'prompt.hidden_states'",
            catalog.ids[code],
        )
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


_CURE = "Only fields, conditions, short loops, arithmetic of numbers and filters such as join and replace are read"


def _compile(text: str, where: str) -> BoundedTemplate:
    try:
        return read_template(text)
    except TemplateTooLarge as error:
        raise ConfigError(f"the template in '{where}' asks for {error}", _CURE) from None
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the template does not parse: {error}", f"Repair '{where}'") from None


def _render(template: BoundedTemplate, fields: Mapping[str, str], what: str, item: str) -> str:
    try:
        return template.render(fields)
    except TemplateTooLarge as error:
        raise ConfigError(f"{what} asks for {error}, on item '{item}'", _CURE) from None
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{what} fails on item '{item}': {error}", f"Fields there are: {', '.join(sorted(set(fields) - {'mask'}))}"
        ) from None


def _cleaned(catalog: Catalog, code: int, special_tokens: Sequence[str], characters: int) -> dict[str, str]:
    return {name: clean_field(value, special_tokens, characters) for name, value in catalog.row(code).items()}


def clean_field(value: str, special_tokens: Sequence[str] = (), characters: int = MAX_FIELD_CHARACTERS) -> str:
    """Returns a field's text without control characters or control tokens, on one line, of bounded length."""
    return whole_field(value, special_tokens)[:characters]


def whole_field(value: str, special_tokens: Sequence[str] = ()) -> str:
    """Returns a field's text as `clean_field` does, of any length."""
    text = visible(value)
    for token in special_tokens:
        text = text.replace(token, " ")
    return " ".join(text.split())


def cut_fields(catalog: Catalog, templates: Sequence[str], characters: int = MAX_FIELD_CHARACTERS) -> dict[str, int]:
    """Returns how many items' values of each field are cut where templates show them, for fields where any is.

    Args:
        catalog: The items.
        templates: Jinja2 templates; only fields that they name count.
        characters: How many characters of a field are read at most.
    """
    named = {name for text in templates for name in names_in(text)}
    counts = {
        name: sum(len(whole_field(text)) > characters for text in column if len(text) > characters)
        for name, column in catalog.fields.items()
        if name in named
    }
    return {name: count for name, count in counts.items() if count}


def content_free(catalog: Catalog) -> Catalog:
    """Returns a catalog of one item of which nothing is known: every field says ``N/A``.

    Source: Zhao et al. 2021, "Calibrate Before Use", section 5.
    """
    return Catalog(("N/A",), dict.fromkeys(catalog.fields, ("N/A",)))
