"""Progress bars: there when work takes long, free when it does not."""

from __future__ import annotations

import pytest

from metarec import progress as module
from metarec.progress import QUIET, progress


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
