"""docs/tutorial.md can be typed as it stands: its commands run in order, and what it shows is what they print."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import bookshop
import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python|text)\n(.*?)```", TUTORIAL, re.S)
# A full training takes a minute; a shorter one takes the same options.
FEWER = {"collaborative.kernel.steps": 4, "collaborative.stack.folds": 2, "train.steps": 4, "train.validate_every": 4}
SHORTER = [part for key, value in FEWER.items() for part in ("--set", f"{key}={value}")]
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def shape(text: str) -> list[str]:
    """What is left of each line when numbers and the titles of books are taken for each other."""
    return [re.sub(r"The \w+ \w+", "TITLE", NUMBER.sub("N", line)).rstrip() for line in text.splitlines()]


def wait_until_ready(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None, "the service ended"
        assert time.monotonic() < deadline, "the service does not answer"
        try:
            with urlopen(f"{address}/readyz") as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_tutorial_can_be_typed_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metarec: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    port, servers, printed = free_port(), [], ""

    def run(command: str) -> str:
        program, *arguments = shlex.split(command)
        if program == "metarec" and arguments[0] == "serve":
            started = [sys.executable, "-m", "metarec.cli", *arguments, "--port", port]
            servers.append(subprocess.Popen(started, stdout=subprocess.DEVNULL))
            wait_until_ready(f"http://127.0.0.1:{port}", servers[0])
            return ""
        if program == "metarec":
            ran = metarec(*arguments, *(SHORTER if arguments[0] == "train" else ()))
            assert ran.status == 0, f"{command}\n{ran.err}"
            return str(ran.out)
        program = sys.executable if program == "python" else program
        done = subprocess.run(
            [program, *(part.replace(":8000", f":{port}") for part in arguments)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "no_proxy": "*"},
        )
        assert '"error"' not in done.stdout, done.stdout
        return done.stdout

    try:
        for kind, text in BLOCKS:
            if kind == "bash":
                printed = "".join(run(command) for command in text.splitlines())
            elif kind == "python":
                exec(text, {})
                assert len(capsys.readouterr().out.splitlines()) == 4
            else:
                assert set(shape(text)) <= set(shape(printed)), text
    finally:
        for server in servers:
            server.terminate()
            server.wait(20)
    assert servers


def test_the_tutorials_table_is_the_one_that_is_made() -> None:
    (shown,) = [text for kind, text in BLOCKS if kind == "text" and text.startswith("customer,")]
    rows = [bookshop.COLUMNS, *bookshop.orders()]
    assert shown.splitlines() == [",".join(row) for row in rows[:4]]
    customers = {row[0] for row in rows[1:]}
    assert f"{len(customers)} customers rated {(len(rows) - 2) // len(customers)} books each" in TUTORIAL


def test_books_that_the_tutorial_names_are_in_the_shop() -> None:
    known = {row[2]: row[3] for row in bookshop.orders()}
    named = re.findall(r"The (?:Last|Quiet|Broken|Golden|Northern|Forgotten) [A-Z]\w+", TUTORIAL)
    assert set(named) <= set(known)
    ids = {row[1]: row[2] for row in bookshop.orders()}
    assert [ids[found] for found in re.findall(r'"item": "(\d+)"', TUTORIAL)] == ["The Last Dragon", "The Golden Alibi"]


def test_readers_who_love_a_genre_are_shown_it() -> None:
    (shown,) = [text for kind, text in BLOCKS if kind == "text" and " by 5 for " in text]
    genres = {row[2]: row[3] for row in bookshop.orders()}
    assert {genres[title] for title in re.findall(r"^ +\d  \S+  (.*)", shown, re.M)} == {"Fantasy"}
