"""Templates end soon, and say what they may not do."""

from __future__ import annotations

import jinja2
import pytest

from metarec.data.interactions import Catalog
from metarec.data.sandbox import TemplateTooLarge, names_in, read_template
from metarec.data.templates import PromptTemplate, derive_fields
from metarec.errors import ConfigError

FIELDS = {"title": "The Matrix", "genres": "Action, Drama", "year": "1999", "text": "word " * 13_000}


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("{{ title * 10**10 }}", "'\\*\\*'"),
        ("{{ title * 10000000000 }}", "str \\* int is not arithmetic"),
        ("{{ [title] * 10000000000 }}", "list \\* int"),
        ("{{ '%01000000000d' % 1 }}", "str % int"),
        ("{{ title.ljust(1000000000) }}", "a call of ljust"),
        ("{{ '{:1000000000}'.format(1) }}", "a call of format"),
        ("{{ text.replace('', text) }}", "a text of more than"),
        ("{{ text | replace('', text) }}", "a text of more than"),
        ("{{ text | join(text) }}", "a text of more than"),
        ("{{ text + text }}", "a text of more than"),
        ("{{ text }}{{ text }}", "a text of more than"),
        ("{{ 1 | round(1000000000, 'ceil') }}", "round"),
        ("{% for a in text %}{% endfor %}", "a loop of more than 1,000 steps"),
        ("{% for a in text[:900] %}{% for b in text[:900] %}{% endfor %}{% endfor %}", "too much work"),
        ("{% for a in text[:900] %}{% if text | upper %}{% endif %}{% endfor %}", "too much work"),
        ("{% set a = title ~ title %}{{ a }}", "'set' in line 1"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "'macro'"),
        ("{% for a in [title] recursive %}{{ loop([title]) }}{% endfor %}", "a call of"),
        ("{{ " + "(" * 900 + "1" + ")" * 900 + " }}", "nested too deep"),
        ("x" * 10_001, "a template of 10,001 characters"),
    ],
)
def test_a_template_that_would_not_end_soon_is_refused(text: str, asked: str) -> None:
    with pytest.raises(TemplateTooLarge, match=asked):
        read_template(text).render(FIELDS)


@pytest.mark.parametrize("text", ["{{ range(9) }}", "{{ title | center(9) }}", "{% include 'a' %}", "{{ lipsum() }}"])
def test_a_template_reaches_nothing_but_its_fields(text: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        read_template(text).render(FIELDS)


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("{{ year | int // 5 * 5 }}", "1995"),
        ("{% for one in [genres, ''] if one %}{{ loop.index }}{{ one }}{% endfor %}", "1Action, Drama"),
        ("{% for one in genres.split(', ') %}{{ one }}{% if not loop.last %} and {% endif %}{% endfor %}", None),
        ("{{ genres.split(', ') | join(' and ') }}", None),
        ("{{ genres | replace(', ', ' and ') }}", None),
        ("{{ title[:3] ~ title[3:] if year else 'x' }}", "The Matrix"),
        ("{{ (year | int + 0.26) | round(1) }}", "1999.3"),
        ("{{ title | default('x') | upper | truncate(3, true, '') }}", "THE"),
    ],
)
def test_what_item_texts_need_is_rendered(text: str, rendered: str | None) -> None:
    assert read_template(text).render(FIELDS) == (rendered or "Action and Drama")


def test_prompts_and_derived_fields_are_bounded_and_say_what_is_read() -> None:
    catalog = Catalog(("1",), {"title": ("Heat",)})
    with pytest.raises(ConfigError, match=r"'prompt.text' asks for '\*\*' in line 1. Only fields"):
        PromptTemplate("{{ title * 10**10 }}", " Yes", " No").render(catalog, 0)
    with pytest.raises(ConfigError, match=r"the template of field 'long' asks for str .* on item '1'\. Only fields"):
        derive_fields(catalog, {"long": "{{ title * 10000000000 }}"})


def test_names_come_in_the_order_of_the_template() -> None:
    assert names_in("{{ b }}{% for x in [c] %}{{ x }}{{ a }}{% endfor %}{{ b }}") == ["b", "c", "a"]
