"""The page: works with scripts and without, asks nobody else, says what failed, and shows what moved and why."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import listening, recommender_without_model

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from starlette.testclient import TestClient

from metarec.data.interactions import Catalog, RatingScale
from metarec.recommending.preferences import Preference
from metarec.scorers.collaborative.side_readers import Categories, Numbers
from metarec.serve import page as page_module
from metarec.serve.app import create_app
from metarec.serve.engine import Engine
from metarec.serve.page_facts import Named, about_fields, bars, choices
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore

STATIC = Path(page_module.__file__).parent / "static"


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(recommender_without_model(), AdapterStore(tmp_path / "store"))


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, ServeSettings(ui=True)), "http://localhost") as client:
        yield client


VOID = ("meta", "link", "input", "rect", "br")
SCRIPTED = {"Metarec-Parts": "1"}


@dataclass
class Element:
    """An element of a page, with the text inside it."""

    tag: str
    attributes: dict[str, str]
    parents: tuple[Element, ...]
    text: str = ""

    def __getitem__(self, name: str) -> str:
        return self.attributes.get(name, "")

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@dataclass
class Reading(HTMLParser):
    """The elements of a page in their order; it fails where an element is not closed."""

    html: str
    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        assert not self.open, [element.tag for element in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, tuple(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}, tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if tag in ("", element.tag)
            and all(value in element[name].split() or value == element[name] for name, value in wanted.items())
        ]

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def inside(self, outer: Element, tag: str = "", **attributes: str) -> list[Element]:
        return [element for element in self.all(tag, **attributes) if outer in element.parents]


def ranking(reading: Reading) -> list[str]:
    """The titles of the ranking."""
    rows = reading.inside(reading.one("section", id="ranking"), "li")
    return [reading.inside(row, "span", class_="title")[0].words for row in rows]


def rate(client: TestClient, item: str, rating: float) -> Reading:
    answer = client.post("/ui/rate", data={"item": item, "rating": rating}, headers=SCRIPTED)
    assert answer.status_code == 200
    return Reading(answer.text)


# What is shown.


def test_each_rating_moves_the_ranking_and_says_what_moved(client: TestClient, engine: Engine) -> None:
    first = client.get("/")
    assert "Rate a few titles" in first.text
    assert client.cookies.get("metarec_visitor", "").startswith("page-")
    rankings = [ranking(Reading(first.text))]
    for version, (item, rating) in enumerate((("m0", 5), ("m2", 1), ("m1", 5), ("m3", 1)), start=1):
        shown = rate(client, item, rating)
        assert shown.one(id="version").words == str(version)
        title = Named.of(engine.catalog, item, engine.code(item)).title
        assert f"Since you gave {title} {rating}:" in shown.one(id="ranking").words
        rankings.append(ranking(shown))
    assert len({tuple(one) for one in rankings}) >= 3
    assert shown.all("span", class_="up") + shown.all("span", class_="down")
    forgotten = Reading(client.post("/ui/forget", headers=SCRIPTED).text)
    assert ranking(forgotten) == rankings[0]
    assert engine.store.sizes()["users"] == 0


def test_arrows_are_the_difference_of_places_to_the_ranking_before(client: TestClient) -> None:
    client.get("/")
    before = ranking(rate(client, "m0", 5))
    shown = rate(client, "m2", 1)
    after, again = ranking(shown), Reading(client.get("/").text)
    assert ranking(again) == after
    for reading in (shown, again):  # who loads the page again sees what moved, too
        rows = reading.inside(reading.one("section", id="ranking"), "li")
        for place, (row, title) in enumerate(zip(rows, after, strict=True), start=1):
            (moved,) = reading.inside(row, "span", class_="move")
            if title in before:
                up = before.index(title) + 1 - place
                assert (f"up {up}" in moved.words, f"down {-up}" in moved.words) == (up > 0, up < 0)


def test_a_rating_explains_nothing_until_somebody_asks_why(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.get("/")
    explained: list[int] = []
    explain = engine.explain

    def counted(person: Any, codes: Any, most: int = 3) -> Any:
        explained.append(len(codes))
        return explain(person, codes, most)

    monkeypatch.setattr(engine, "explain", counted)
    rate(client, "m0", 5)
    rate(client, "m2", 1)
    assert explained == []
    why = Reading(client.get("/ui/ranking", params={"why": 1}).text)
    assert explained == [10]
    assert why.one("button", id="why")["aria-expanded"] == "true"
    reasons = why.all("p", class_="because")
    assert len(reasons) == 10
    assert all("you gave" in reason.words for reason in reasons)


def test_each_rating_scores_as_many_items_as_the_last(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.get("/")
    scored: list[int] = []
    scores_of = engine._model.scores_of
    monkeypatch.setattr(
        engine._model,
        "scores_of",
        lambda asked: (scored.extend(len(codes) for _, codes in asked), scores_of(asked))[1],
    )
    counts = []
    for item in ("m0", "m1", "m2", "m3"):
        scored.clear()
        rate(client, item, 3)
        counts.append(list(scored))
    # The first is compared with a new user's ranking, which is known by then.
    assert {len(one) for one in counts} == {1}
    assert max(sum(one) for one in counts) <= 40


def test_what_is_believed_becomes_surer_with_each_rating(client: TestClient) -> None:
    first = Reading(client.get("/").text)
    known = [float(first.one("meter")["value"])]
    widths = [float(first.all("rect", class_="whisker")[0]["width"])]
    for item in ("m0", "m2", "m1"):
        shown = rate(client, item, 5 if item != "m2" else 1)
        known.append(float(shown.one("meter")["value"]))
        widths.append(float(shown.all("rect", class_="whisker")[0]["width"]))
    assert known[0] == 0
    assert known == sorted(set(known))
    assert widths[-1] < widths[0]
    rows = {row.words.split()[0]: row.words for row in shown.all("tr")}
    assert "+" in rows["drama"]
    assert "-" in rows["horror"]


def test_bars_keep_their_scale_and_their_picture() -> None:
    made = [
        Preference("genres", "drama", 9, 0.5, 0.25, 0.75, 1.0),
        Preference("genres", "horror", 9, -0.5, -9.0, 8.0, 0.5),
    ]
    drama, horror = bars(made)
    assert drama.before == (30.0, 140.0)
    assert drama.bar == (100.0, 35.0)
    assert drama.whisker == (117.5, 35.0)
    assert (horror.before, horror.bar, horror.whisker) == ((65.0, 70.0), (65.0, 35.0), (0.0, 200.0))
    assert bars([]) == []


@pytest.mark.parametrize(
    ("title", "shown"),
    [("Godfather, The (1972)", ("The Godfather", "1972")), ("", ("item 7", "")), ("  ", ("item 7", ""))],
)
def test_titles_are_as_people_write_them_and_nothing_is_without_a_name(title: str, shown: tuple[str, str]) -> None:
    found = Named.of(Catalog(("7",), {"title": (title,)}), "7", 0)
    assert (found.title, found.year) == shown


def test_added_items_are_found_under_the_title_that_people_write(client: TestClient) -> None:
    client.post("/v1/items", json={"id": "x9", "fields": {"title": "Quiet Hours, The (1999)"}})
    found = Reading(client.get("/ui/find", params={"q": "quiet hours"}).text)
    assert "The Quiet Hours 1999" in [one.words for one in found.all("div", class_="title")]
    assert found.all("button", aria_label="Rate The Quiet Hours 5")


def test_scales_with_many_numbers_offer_a_few() -> None:
    assert choices(RatingScale(0.5, 5.0)) == [1, 2, 3, 4, 5]
    assert choices(RatingScale(0, 1)) == [0, 1]
    assert choices(RatingScale(-10, 10)) == [-10, -5, 0, 5, 10]


# What to rate.


def test_what_is_offered_tells_most_and_others_can_be_had(client: TestClient, engine: Engine) -> None:
    first = Reading(client.get("/").text)
    offered = [one["value"] for one in first.all("input", name="item")]
    telling = client.get("/v1/users/nobody/informative", params={"k": 6}).json()["items"]
    assert offered == [one["item"] for one in telling]
    skipped = [one["value"] for one in first.all("input", name="skip")]
    assert skipped == offered
    others = Reading(client.get("/ui/find", params={"skip": skipped}).text)
    assert not {one["value"] for one in others.all("input", name="item")} & set(offered)
    assert [one["value"] for one in others.all("input", name="skip")][:6] == offered


def test_the_chosen_rating_is_marked(client: TestClient, engine: Engine) -> None:
    client.get("/")
    rate(client, "m0", 4)
    found = Reading(client.get("/ui/find", params={"q": engine.catalog.fields["title"][0]}).text)
    (item,) = found.all("input", name="item", value="m0")
    buttons = found.inside(item.parents[-1], "button")
    assert [button["aria-pressed"] for button in buttons] == ["false", "false", "false", "true", "false"]


def test_fields_about_oneself_are_asked_as_what_reads_them_needs() -> None:
    kinds = Categories(("f", "m"), np.array([0.5, 0.5]))
    text = Categories(("train",), np.array([0.5]), words=True)
    fields = about_fields(
        {"gender": kinds, "birth_year": Numbers(np.array([1.0]), 1.0, np.array([0.0])), "about": text},
        {"gender": "f"},
    )
    assert [(one.label, one.value, tuple(one.choices), one.number) for one in fields] == [
        ("Gender", "f", ("f", "m"), False),
        ("Birth year", "", (), True),
        ("In a sentence", "", (), False),
    ]


# What goes wrong.


@pytest.mark.parametrize("data", [{}, {"item": "m1"}, {"item": "m1", "rating": "x"}, {"item": "no", "rating": "3"}])
def test_a_form_that_cannot_be_meant_is_refused_where_it_is_seen(data: dict[str, str], client: TestClient) -> None:
    client.get("/")
    plain = client.post("/ui/rate", data=data)
    assert plain.status_code == 422
    alert = Reading(plain.text).one(role="alert")
    assert alert.words
    scripted = client.post("/ui/rate", data=data, headers=SCRIPTED)
    assert scripted.status_code == 422
    assert scripted.json()["error"]["message"] in alert.words


def test_the_page_works_without_scripts(client: TestClient) -> None:
    client.get("/")
    found = client.get("/", params={"q": "love"})
    item = Reading(found.text).all("input", name="item")[0]["value"]
    answer = client.post("/ui/rate", data={"item": item, "rating": 4})
    assert answer.status_code == 200
    assert answer.url.path == "/"
    assert "Your ranking" in answer.text
    assert Reading(client.get("/", params={"why": 1}).text).all("p", class_="because")


# What the page is made of.


def test_nothing_is_asked_of_anybody_else(client: TestClient) -> None:
    page = client.get("/")
    assert not re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?(?:https?:)?//""", page.text)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    links = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert links
    for link in links:
        assert client.get(link).status_code == 200
    for script in STATIC.glob("*.js"):
        assert client.get(f"/ui/{script.name}").headers["content-type"].startswith("text/javascript")
        assert not re.search(r"https?://|innerHTML|eval\(", script.read_text(encoding="utf-8"))
    assert not re.search(r"\s(style|on\w+)=", page.text)  # the policy would not run them


def test_titles_are_text_and_never_markup(client: TestClient) -> None:
    client.post("/v1/items", json={"id": "x", "fields": {"title": "<script>alert(1)</script>"}})
    shown = client.get("/ui/find", params={"q": "<script>alert(1)</script>"}).text
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


def test_everything_has_a_name_and_only_short_news_is_read_out(client: TestClient) -> None:
    client.get("/")
    rate(client, "m0", 5)
    reading = Reading(client.get("/", params={"why": 1}).text)
    ids = [element["id"] for element in reading.elements if element["id"]]
    assert len(ids) == len(set(ids))
    for element in reading.elements:
        for name in ("aria-labelledby", "aria-controls", "for"):
            assert not element[name] or element[name] in ids, (name, element[name])
    labelled = {element["for"] for element in reading.all("label")}
    for entry in reading.elements:
        if entry.tag in ("input", "select") and entry["type"] != "hidden":
            assert entry["id"] in labelled
        if entry.tag == "button":
            assert entry["aria-label"] or entry.words
            assert entry.words in entry["aria-label"] or not entry["aria-label"]
    assert len(reading.all("main")) == len(reading.all("h1")) == 1
    assert all(section["aria-labelledby"] for section in reading.all("section"))
    live = [element for element in reading.elements if element["aria-live"] or element["role"] in ("alert", "status")]
    assert [element["id"] for element in live] == ["problem", "said"]
    assert reading.one("html")["lang"] == "en"


def test_few_tab_stops_lead_to_the_ranking(client: TestClient) -> None:
    reading = Reading(client.get("/").text)
    stops = [
        element
        for element in reading.elements
        if element.tag in ("button", "select", "summary", "a")
        or (element.tag == "input" and element["type"] != "hidden")
    ]
    toolbars = reading.all(role="toolbar")
    inside = [stop for stop in stops if any(parent["role"] == "toolbar" for parent in stop.parents)]
    assert len(toolbars) == 6
    assert len(stops) - len(inside) + len(toolbars) <= 12
    before = [
        stop for stop in stops if reading.elements.index(stop) < reading.elements.index(reading.one(id="ranking"))
    ]
    assert before == []


SCRIPT_TESTS = """
import { test } from "node:test";
import assert from "node:assert/strict";
import { Newest, problemText } from "./parts.js";
import { placeAfter } from "./toolbar.js";

test("problems are said with their cure, and without an answer", () => {
  const body = JSON.stringify({ error: { status: 422, message: "the form has no rating", cure: "Choose one" } });
  assert.equal(problemText(422, body), "The form has no rating. Choose one.");
  assert.match(problemText(0, ""), /does not answer/);
  assert.match(problemText(502, "<html>"), /502/);
});
test("an answer that a newer request has overtaken is not the newest", () => {
  const kind = new Newest();
  const first = kind.begin();
  assert.ok(first());
  const second = kind.begin();
  assert.ok(!first() && second());
});
test("arrow keys move inside a row and between rows, and stop at the ends", () => {
  assert.deepEqual(placeAfter("ArrowRight", [0, 0], [6, 5]), [0, 1]);
  assert.deepEqual(placeAfter("ArrowLeft", [0, 0], [6, 5]), [0, 0]);
  assert.deepEqual(placeAfter("End", [2, 1], [6, 5]), [2, 4]);
  assert.deepEqual(placeAfter("Home", [2, 3], [6, 5]), [2, 0]);
  assert.deepEqual(placeAfter("ArrowDown", [5, 3], [6, 5]), [5, 3]);
  assert.deepEqual(placeAfter("ArrowUp", [5, 3], [6, 5]), [4, 3]);
  assert.equal(placeAfter("Enter", [0, 0], [6, 5]), null);
});
"""


def test_the_scripts_know_their_answers(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node is installed")
    for script in STATIC.glob("*.js"):
        shutil.copy(script, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "known.test.js").write_text(SCRIPT_TESTS)
    ran = subprocess.run([node, "--test", "known.test.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout


# In a browser.


@pytest.fixture
def address(engine: Engine) -> Iterator[str]:
    with listening(create_app(engine, ServeSettings(ui=True))) as url:
        yield f"{url}/"


@pytest.fixture
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


class Visit:
    """A page in a real browser, everything that it asked for, and everything that it complained about."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)

    def ranking(self) -> list[str]:
        return list(self.page.locator("#ranking ol .title").all_text_contents())

    def wait_for_version(self, version: int) -> None:
        self.page.locator(f"#version:text-is('{version}')").wait_for(state="attached")

    def rate(self, title: str, rating: int, version: int) -> None:
        self.page.get_by_label("Find a title").fill(title)
        button = self.page.get_by_role("button", name=f"Rate {title} {rating}", exact=True).first
        button.click()
        self.wait_for_version(version)
        assert button.get_attribute("aria-pressed") == "true"


@pytest.fixture
def visit(address: str, chromium: str) -> Iterator[Visit]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        options = {"executable_path": chromium, "args": ["--headless", "--no-sandbox", "--disable-gpu"]}
        browser = started.chromium.launch(**options)
        seen = Visit(browser.new_page(viewport={"width": 390, "height": 844}))
        seen.page.set_default_timeout(20_000)
        seen.page.goto(address)
        yield seen
        browser.close()


def test_clicking_five_ratings_moves_the_ranking_each_time_and_forgetting_moves_it_back(
    visit: Visit, engine: Engine, address: str
) -> None:
    page = visit.page
    rankings = [visit.ranking()]
    assert len(rankings[0]) == 10
    loved = [(code, 5 if code % 4 < 2 else 1) for code in (0, 2, 1, 3, 4)]
    for version, (code, rating) in enumerate(loved, start=1):
        visit.rate(engine.catalog.fields["title"][code], rating, version)
        rankings.append(visit.ranking())
        assert "Your ranking" in page.locator("#said").inner_text()
    assert all(before != after for before, after in pairwise(rankings))
    page.get_by_role("button", name="Why these?").click()
    page.locator("#ranking .because").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "why"
    page.get_by_role("button", name="Forget me").click()
    visit.wait_for_version(0)
    assert visit.ranking() == rankings[0]
    assert engine.store.sizes()["users"] == 0
    assert {url[: len(address)] for url in visit.asked if not url.startswith("data:")} == {address}
    assert visit.complaints == []


def test_the_page_needs_no_mouse_and_few_tab_stops(visit: Visit) -> None:
    page = visit.page
    stops = []
    for _ in range(30):
        page.keyboard.press("Tab")
        stop = page.evaluate("() => document.activeElement.getAttribute('aria-label') || document.activeElement.id")
        if stop in stops or not stop:
            break
        stops.append(stop)
    assert len(stops) <= 12
    page.locator("#found [role=toolbar] button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    name = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert name.startswith("Rate ")
    assert name.endswith(" 5")
    page.keyboard.press("Enter")
    visit.wait_for_version(1)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == name
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


def test_a_refusal_and_a_server_that_is_gone_are_seen(visit: Visit) -> None:
    page = visit.page
    first = page.locator("#found form").first
    first.locator("input[name=item]").evaluate("field => { field.value = 'no such item' }")
    first.get_by_role("button").last.click()
    alert = page.get_by_role("alert")
    alert.get_by_text("No item has that id.").wait_for()
    assert first.locator("[aria-pressed=true]").count() == 0
    page.route("**/ui/**", lambda route: route.abort())
    page.locator("#found form").nth(1).get_by_role("button").first.click()
    alert.get_by_text("does not answer").wait_for()
    page.unroute("**/ui/**")
    alert.get_by_role("button", name="Try again").click()
    visit.wait_for_version(1)
    assert alert.inner_text() == ""


def test_stale_results_cannot_be_used_and_the_newest_answer_stays(visit: Visit) -> None:
    page = visit.page
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    page.route("**/ui/find?q=lo*", hold)
    page.get_by_label("Find a title").fill("lo")
    assert page.locator("#found").evaluate("part => part.inert") is True
    for _ in range(200):
        if not held:
            page.wait_for_timeout(50)
    assert held
    page.get_by_label("Find a title").fill("night")
    page.get_by_text("Found, nearest first").wait_for()
    shown = page.locator("#found").inner_text()
    assert page.locator("#found").evaluate("part => part.inert") is False
    for route in held:
        route.fulfill(body='<div id="found">old</div>', content_type="text/html")
    page.wait_for_timeout(200)
    assert page.locator("#found").inner_text() == shown


def test_axe_finds_nothing_and_nothing_is_cut_off(visit: Visit, address: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = visit.page
    for version in (1, 2):
        page.locator("#found form").nth(version).get_by_role("button").last.click()
        visit.wait_for_version(version)
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(address)
        box = {name: page.locator(name).bounding_box() for name in ("#ranking", ".rate")}
        beside = box["#ranking"]["x"] + box["#ranking"]["width"] <= box[".rate"]["x"]
        above = box["#ranking"]["y"] + box["#ranking"]["height"] <= box[".rate"]["y"]
        assert beside if width == 1280 else above
        page.get_by_role("button", name="Why these?").click()
        page.locator("#ranking .because").first.wait_for()
        found = axe.Axe().run(page)
        assert found.violations_count == 0, f"{width} {scheme}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.goto(f"{address}docs")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_on_a_phone_the_ranking_stays_in_sight_and_hides_no_focus(visit: Visit) -> None:
    page = visit.page
    page.locator("#found [role=toolbar] button[tabindex='0']").last.focus()
    ranking = page.locator("#ranking").bounding_box()
    focused = page.evaluate_handle("document.activeElement").as_element().bounding_box()
    assert ranking["y"] >= 0
    assert focused["y"] >= ranking["y"] + ranking["height"]
    page.locator("#found [role=toolbar] button[tabindex='0']").first.focus()
    focused = page.evaluate_handle("document.activeElement").as_element().bounding_box()
    assert focused["y"] >= ranking["y"] + ranking["height"]
    assert page.locator("#ranking li").nth(5).is_hidden()
    page.get_by_role("button", name="All ten").click()
    assert page.locator("#ranking li").nth(9).is_visible()


def test_without_scripts_the_forms_still_work(address: str, chromium: str, visit: Visit) -> None:
    context = visit.page.context.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address + "?q=love")
    before = page.locator("#ranking ol .title").all_text_contents()
    page.locator("#found button", has_text="5").first.click()
    page.locator("#version", has_text="1").wait_for()
    assert page.locator("#ranking ol .title").all_text_contents() != before
    context.close()
