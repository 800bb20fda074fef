"""Takes the pictures of the service's page.

    python docs/screenshots.py --checkpoint runs/mine

Needs Chromium and playwright. A visitor rates the first titles that the page offers; no key and no network is needed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# File, width, height, colours.
PICTURES = (
    ("page-1280.png", 1280, 900, "light"),
    ("page-1280-dark.png", 1280, 900, "dark"),
    ("page-390.png", 390, 844, "light"),
)
RATINGS = (5, 2, 4, 1, 5)
CHROMIUM = ("chromium-headless-shell", "chromium", "google-chrome")


def chromium() -> str:
    """Returns the path of Chromium, or ends the program where there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        raise SystemExit(f"error: none of {', '.join(CHROMIUM)} is installed. On Debian: apt-get install {CHROMIUM[0]}")
    return found


@contextmanager
def serving(checkpoint: Path, store: Path) -> Iterator[str]:
    """Serves a run with its page from a thread of this process, and gives the page's address."""
    import uvicorn

    from metarec import MetaRecommender
    from metarec.serve.app import create_app
    from metarec.serve.engine import Engine
    from metarec.serve.service import ServeSettings
    from metarec.serve.store import AdapterStore

    engine = Engine(MetaRecommender.from_pretrained(checkpoint), AdapterStore(store))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, ServeSettings(ui=True)), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)


def rate_and_show(page: Any, address: str) -> None:
    """Opens the page and rates the first titles that it offers."""
    page.goto(address)
    for row, rating in enumerate(RATINGS):
        page.locator("#found form").nth(row).get_by_role("button", name=str(rating)).last.click()
        page.locator(f"#version:text-is('{row + 1}')").wait_for()
    page.mouse.move(0, 0)
    page.evaluate("() => scrollTo(0, 0)")


def take(address: str, out: Path) -> list[Path]:
    """Writes the pictures into a folder, each of a new visitor, and returns their paths."""
    from playwright.sync_api import sync_playwright

    written = []
    with sync_playwright() as started:
        options = ["--headless", "--no-sandbox", "--disable-gpu"]
        browser = started.chromium.launch(executable_path=chromium(), args=options)
        for name, width, height, colours in PICTURES:
            view = {"width": width, "height": height}
            context = browser.new_context(viewport=view, color_scheme=colours, reduced_motion="reduce")
            page = context.new_page()
            page.set_default_timeout(120_000)
            rate_and_show(page, address)
            written.append(out / name)
            page.screenshot(path=str(written[-1]))
            context.close()
        browser.close()
    return written


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run, e.g. of metarec train")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures")
    given = parser.parse_args()
    chromium()
    with tempfile.TemporaryDirectory() as store, serving(given.checkpoint, Path(store) / "store") as address:
        for file in take(address, given.out):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
