"""Progress bars: there when work takes long, free when it does not."""

from __future__ import annotations

import threading
import time

import pytest
from rich.table import Table

from metarec.cli.options import console
from metarec.system import progress as module
from metarec.system.progress import QUIET, progress


def test_work_that_is_done_in_time_never_makes_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_bars", lambda: pytest.fail("a bar was made"))
    with progress("quick", 2, after=60.0) as advance:
        advance(1)
        advance(2)


def test_a_bar_says_what_is_done_and_how_much_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(QUIET, raising=False)
    with progress("slow", 3) as advance:
        advance(3)
    written = capsys.readouterr()
    assert written.out == ""
    assert "slow" in written.err
    assert "3/3" in written.err


def test_brackets_are_printed_and_no_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row's settings and a title may stand in brackets, which a terminal's library reads as styles."""
    monkeypatch.delenv(QUIET, raising=False)
    with progress("cells [a=1]", 3) as advance:
        advance(3, "metarec [steps=5]")
    table = Table(title="titles [b=2]")
    table.add_row("metarec [meta.inner_steps=5]")
    console().print(table)
    written = capsys.readouterr()
    assert "metarec [meta.inner_steps=5]" in written.out
    assert "titles [b=2]" in written.out
    assert "cells [a=1]" in written.err
    assert "metarec [steps=5]" in written.err


def test_without_a_terminal_lines_say_share_and_rest_however_long_a_unit_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(QUIET, raising=False)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.01)

    def line_with(text: str) -> str:
        written, until = "", time.monotonic() + 20
        while text not in written and time.monotonic() < until:
            written += capsys.readouterr().err
            time.sleep(0.01)
        return next(line for line in written.splitlines() if text in line)

    with progress("slow", 4, after=0.01) as advance:
        assert "so far" in line_with("slow: 0%")
        advance(1, "loss 0.5")
        line = line_with("slow: 25%")
    assert "left" in line
    assert "loss 0.5" in line


def test_nothing_is_said_once_the_work_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(QUIET, raising=False)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.01)
    before = set(threading.enumerate())
    with pytest.raises(KeyError), progress("slow", 4, after=60.0):
        raise KeyError
    assert not set(threading.enumerate()) - before
    assert capsys.readouterr().err == ""
