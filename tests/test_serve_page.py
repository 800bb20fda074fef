"""The page: works with scripts and without, asks nobody else, and shows why."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import listening, small_recommender

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from starlette.testclient import TestClient

from metarec.serve.app import create_app
from metarec.serve.engine import Engine
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore


@pytest.fixture
def engine(model_dir: Callable[[str], Path], tmp_path: Path) -> Engine:
    return Engine(small_recommender(model_dir("llama")), AdapterStore(tmp_path / "store"))


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, ServeSettings(ui=True)), "http://localhost") as client:
        yield client


def titles(html: str) -> list[str]:
    return re.findall(
        r'<span class="title">([^<]*)</span>\s*(?:<span class="(?:up|down)|<span class="number soft)', html
    )


HTMX = {"HX-Request": "true"}


def test_each_rating_moves_the_ranking_and_says_why(client: TestClient, engine: Engine) -> None:
    first = client.get("/")
    assert "Rate a few titles" in first.text
    assert client.cookies.get("metarec_visitor", "").startswith("page-")
    rankings = [titles(first.text)]
    for version, (item, rating) in enumerate((("m0", 5), ("m2", 1), ("m1", 5), ("m3", 1)), start=1):
        shown = client.post("/ui/rate", data={"item": item, "rating": rating}, headers=HTMX)
        assert f'<b id="version">{version}</b>' in shown.text
        rankings.append(titles(shown.text))
    assert len({tuple(ranking) for ranking in rankings}) >= 3
    assert "because" in shown.text
    assert "loss on your ratings" in shown.text
    assert re.search(r"&#9650;|&#9660;|>new<", shown.text)
    forgotten = client.post("/ui/forget", headers=HTMX)
    assert titles(forgotten.text) == rankings[0]
    assert engine.store.sizes()["users"] == 0


def test_the_page_works_without_scripts(client: TestClient) -> None:
    client.get("/")
    found = client.get("/", params={"q": "love"})
    item = re.search(r'name="item" value="([^"]+)"', found.text)
    assert item is not None
    answer = client.post("/ui/rate", data={"item": item[1], "rating": 4})
    assert answer.status_code == 200
    assert answer.url.path == "/"
    assert "Your ranking" in answer.text


def test_nothing_is_asked_of_anybody_else(client: TestClient) -> None:
    page = client.get("/")
    assert not re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?(?:https?:)?//""", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for link in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        assert client.get(link).status_code == 200
    assert "unsafe" not in page.headers["content-security-policy"]


def test_titles_are_text_and_never_markup(client: TestClient) -> None:
    client.post("/v1/items", json={"id": "x", "fields": {"title": "<script>alert(1)</script>"}})
    shown = client.get("/ui/find", params={"q": "<script>alert(1)</script>"}).text
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


@pytest.mark.parametrize("data", [{}, {"item": "m1"}, {"item": "m1", "rating": "x"}, {"item": "no", "rating": "3"}])
def test_a_form_that_cannot_be_meant_is_refused(data: dict[str, str], client: TestClient) -> None:
    client.get("/")
    assert client.post("/ui/rate", data=data).status_code == 422


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
        return list(self.page.locator("#ranking ol .title").all_inner_texts())

    def wait_for_version(self, version: int) -> None:
        self.page.locator("#version").get_by_text(str(version), exact=True).wait_for()

    def rate(self, title: str, rating: int, version: int) -> None:
        self.page.get_by_label("Title or description").fill(title)
        button = self.page.get_by_role("button", name=f"Rate {title} {rating}", exact=True).first
        button.click()
        self.wait_for_version(version)


@pytest.fixture
def visit(address: str, chromium: str) -> Iterator[Visit]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        options = {"executable_path": chromium, "args": ["--headless", "--no-sandbox", "--disable-gpu"]}
        browser = started.chromium.launch(**options)
        seen = Visit(browser.new_page(viewport={"width": 375, "height": 700}))
        seen.page.set_default_timeout(20_000)
        seen.page.goto(address)
        yield seen
        browser.close()


def test_clicking_five_ratings_moves_the_ranking_each_time_and_forgetting_moves_it_back(
    visit: Visit, engine: Engine
) -> None:
    page = visit.page
    rankings = [visit.ranking()]
    assert len(rankings[0]) == 10
    loved = [(code, 5 if code % 4 < 2 else 1) for code in (0, 2, 1, 3, 4)]
    for version, (code, rating) in enumerate(loved, start=1):
        visit.rate(engine.catalog.fields["title"][code], rating, version)
        rankings.append(visit.ranking())
    assert all(before != after for before, after in pairwise(rankings))
    assert page.get_by_text("because").count() > 0
    assert page.get_by_text("loss on your ratings").is_visible()
    page.get_by_role("button", name="Forget me").click()
    visit.wait_for_version(0)
    assert visit.ranking() == rankings[0]
    assert engine.store.sizes()["users"] == 0


def test_the_page_needs_no_mouse_no_wide_screen_and_nobody_else(visit: Visit, address: str) -> None:
    page = visit.page
    page.get_by_label("Title or description").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Rate ")
    page.keyboard.press("Enter")
    visit.wait_for_version(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert {url[: len(address)] for url in visit.asked if not url.startswith("data:")} == {address}
    assert visit.complaints == []


def test_without_scripts_the_forms_still_work(address: str, chromium: str, visit: Visit) -> None:
    context = visit.page.context.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address + "?q=love")
    before = page.locator("#ranking ol .title").all_inner_texts()
    page.locator("#found button", has_text="5").first.click()
    page.locator("#version", has_text="1").wait_for()
    assert page.locator("#ranking ol .title").all_inner_texts() != before
    context.close()
