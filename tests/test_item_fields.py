"""What is known of an item beside ratings: its text and its fields, whatever they are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_tasks import BASE

from metarec.config import validated
from metarec.data.interactions import Catalog
from metarec.data.item_fields import MAX_FIELDS, choose_fields, field_kind, numbers_in, tokens_in
from metarec.data.task import Task
from metarec.data.task_files import load_task
from metarec.data.templates import item_text, review_sentence
from metarec.errors import ConfigError
from metarec.scorers.collaborative.features import item_features

ITEMS = 40
GENRES = tuple(("Drama, War", "Drama", "Noir", "Noir, Crime")[code % 4] for code in range(ITEMS))
COLUMNS = {
    "title": tuple(f"Book {code}" for code in range(ITEMS)),
    "genre": GENRES,
    "price": tuple(f"{code % 9},99 €" if code % 13 else "" for code in range(ITEMS)),
    "published": tuple(f"{1950 + code}-0{1 + code % 9}-15" for code in range(ITEMS)),
    "stock": tuple(("True", "False")[code % 2] for code in range(ITEMS)),
    "blurb": tuple(f"A tale of {code} roads, told in {code + 3} nights" for code in range(ITEMS)),
    "isbn": tuple(str(9_783_000_000_000 + 37 * code) for code in range(ITEMS)),
    "row": tuple(map(str, range(ITEMS))),
    "language": ("en",) * ITEMS,
    "cover": ("",) * ITEMS,
}
CATALOG = Catalog(tuple(f"i{code}" for code in range(ITEMS)), COLUMNS)


def task(prompt: str = "Good?\n{{ title }}\nAnswer:", **changes: Any) -> Task:
    return validated(Task, BASE | {"prompt": {**BASE["prompt"], "text": prompt}, **changes}, "test")


def test_fields_become_features_by_what_they_hold() -> None:
    choice = choose_fields(CATALOG)
    assert choice.read == {"genre": "category", "price": "number", "published": "number", "stock": "category"}
    assert choice.unread == {
        "blurb": "text",
        "isbn": "an id",
        "row": "an id",
        "language": "one value",
        "cover": "empty",
    }
    assert {name: block.shape for name, block in item_features(CATALOG).items()} == {
        "genre": (ITEMS, 4),
        "price": (ITEMS, 7),
        "published": (ITEMS, 7),
        "stock": (ITEMS, 2),
    }


@pytest.mark.parametrize(("usual", "own"), [("genres", "genre"), ("authors", "Autor"), ("year", "released")])
def test_a_field_of_another_name_gives_the_same_features(usual: str, own: str) -> None:
    column = tuple(str(1950 + code) for code in range(ITEMS)) if usual == "year" else GENRES
    first, second = (Catalog(CATALOG.ids, {"title": COLUMNS["title"], name: column}) for name in (usual, own))
    np.testing.assert_array_equal(item_features(first)[usual], item_features(second)[own])
    templates = [task(f"Good? {{{{ title }}}} {{{{ {name} }}}} Answer:").item_text for name in (usual, own)]
    texts = [template.render(catalog, 3) for template, catalog in zip(templates, (first, second), strict=True)]
    assert texts[0] == texts[1].replace(", 1953", " (1953)")


@pytest.mark.parametrize(
    ("column", "tokens"),
    [
        (("Comedy Drama", "Drama", "Comedy", "Comedy Drama"), {"Comedy", "Drama"}),
        (("New York", "York", "New Orleans"), {"New York", "York", "New Orleans"}),
        (("Action|Drama", "Sci Fi"), {"Action", "Drama", "Sci Fi"}),
        (("a; b", ""), {"a", "b"}),
        (("科幻、喜剧", "愛情，劇情；恐怖"), {"科幻", "喜剧", "愛情", "劇情", "恐怖"}),  # noqa: RUF001
        (("دراما، كوميديا", "حرب؛ دراما"), {"دراما", "كوميديا", "حرب"}),
    ],
)
def test_categories_end_where_the_column_ends_them(column: tuple[str, ...], tokens: set[str]) -> None:
    assert set().union(*tokens_in(column)) == tokens


def test_numbers_are_read_as_people_write_them() -> None:
    found = numbers_in(["1,299.50", "$12", "12,5", "15 %", "USD", "2001-07-01", "-3", "free", "7 EUR", "1.299,50 €"])
    np.testing.assert_array_equal(found, [1299.5, 12, 12.5, 15, np.nan, 2001.5, -3, np.nan, 7, 1299.5])


@pytest.mark.parametrize(
    ("texts", "years"),
    [
        (["31.12.2004", "01.07.1999"], [2004 + 11 / 12, 1999.5]),
        (["12/31/2004", "7/1/1999"], [2004 + 11 / 12, 1999.5]),
        (["3/4/2004"], [2004]),
        (["Jul 1, 1999", "1 July 1999"], [1999.5, 1999.5]),
        (["1999年7月1日", "2004年"], [1999.5, 2004]),
        (["1999-07-01T10:00"], [1999.5]),
    ],
)
def test_dates_are_read_as_people_write_them(texts: list[str], years: list[float]) -> None:
    np.testing.assert_allclose(numbers_in(texts), years)


def test_running_text_is_no_category_though_it_has_commas() -> None:
    words = [f"word{number}" for number in range(400)]
    draw = np.random.default_rng(0)
    prose = [", ".join(" ".join(draw.choice(words, 6)) for _ in range(3)) for _ in range(200)]
    assert field_kind("text", prose) == "text"
    assert field_kind("title", [" ".join(draw.choice(words, 3)) for _ in range(200)]) == "text"


def test_a_task_names_its_fields_and_their_kinds() -> None:
    listed = task(features={"fields": ["price", "genre"]}).read_fields(CATALOG)
    assert listed.read == {"price": "number", "genre": "category"}
    assert listed.unread["published"] == "not named"
    forced = task(features={"fields": {"price": "category"}}).read_fields(CATALOG)
    assert forced.read == {"price": "category"}
    assert task(features={"fields": []}).read_fields(CATALOG).read == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["gendre"], "names 'gendre'.*Did you mean 'genre'"),
        (["blurb"], "of which no value is carried by 5 items"),
        ({"blurb": "number"}, "calls 'blurb' a number"),
    ],
)
def test_fields_that_cannot_be_read_are_refused(fields: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        task(features={"fields": fields}).read_fields(CATALOG)


def test_fields_made_from_others_are_read_where_they_are_named() -> None:
    dataset = {**BASE["dataset"], "fields": {"genre": "{{ stock }}"}}
    assert task(dataset=dataset).read_fields(CATALOG).unread["genre"] == "made from other fields"
    named = task(dataset=dataset, features={"fields": ["genre"]})
    assert named.read_fields(CATALOG).read == {"genre": "category"}


def test_more_fields_than_a_fit_can_bear_are_left_out_and_named() -> None:
    many = {f"tag{number}": GENRES for number in range(MAX_FIELDS + 2)}
    choice = choose_fields(replace(CATALOG, fields={"title": COLUMNS["title"], **many}))
    assert len(choice.read) == MAX_FIELDS
    assert set(choice.unread.values()) == {f"more than {MAX_FIELDS} fields"}


JOKES = Catalog(("1", "2"), {"title": ("Joke 1", "Joke 2"), "joke": ("Why did the chicken cross?", "Knock knock.")})


def test_an_item_whose_text_is_no_title_is_read_by_its_text() -> None:
    template = task("Is it funny?\n{{ joke }}\nAnswer:").item_text
    assert template.render(JOKES, 1) == "Knock knock."
    assert review_sentence("{{ joke }} {{ mask }}").startswith('Review: "{{ joke }}".')
    assert item_text("{{ id }}?") == "{{ title }}"


def test_the_text_is_what_the_prompt_names_or_what_the_task_says() -> None:
    assert task("{{ title }}? {{ joke }}").item_text.render(JOKES, 1) == "Joke 2, Knock knock."
    said = task(features={"text": "A joke: {{ joke }}"}).item_text
    assert said.render(JOKES, 1) == "A joke: Knock knock."
    with pytest.raises(ConfigError, match=r"the template of 'features\.text' fails on item '1'"):
        task(features={"text": "{{ jokes }}"}).item_text.render(JOKES, 0)


def test_a_task_without_features_keeps_its_digest_and_metarecs_own_tasks_their_texts() -> None:
    assert task().digest == task(features={}).digest != task(features={"fields": []}).digest
    movie = Catalog(("1",), {"title": ("Heat",), "year": ("1995",), "genres": ("Crime, Drama",), "authors": ("",)})
    assert load_task("movielens/user-cold").item_text.render(movie, 0) == "Heat (1995), Crime, Drama"
    assert load_task("cross-domain/books-to-movies").item_text.render(movie, 0) == "Heat (1995), Crime, Drama"
    book = Catalog(("1",), {"title": ("Emma",), "year": ("1815",), "authors": ("Jane Austen",)})
    assert load_task("goodbooks/user-cold").item_text.render(book, 0) == "Emma (1815), Jane Austen"
