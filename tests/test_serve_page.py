"""The page: works with scripts and without, asks nobody else, and shows why."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import small_recommender

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
import uvicorn
from starlette.testclient import TestClient

from metarec.serve.app import ServeSettings, create_app
from metarec.serve.engine import Engine
from metarec.store import AdapterStore


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


def test_a_browser_shows_the_page(engine: Engine, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    app = create_app(engine, ServeSettings(ui=True))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        where = f"http://127.0.0.1:{port}/?q=love"
        done = subprocess.run(
            [browser, *options, "--virtual-time-budget=4000", "--dump-dom", where],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        server.should_exit = True
        thread.join(20)
    assert "The ranking before you say anything" in done.stdout
    assert len(titles(done.stdout)) == 10
    assert "Refused to" not in done.stderr
