"""The documentation builds as a site without a warning, its links lead somewhere, and docstrings say what code does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import build_site
import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning_or_a_dead_link() -> None:
    pytest.importorskip("zensical", reason="zensical is not installed: pip install 'metarec[docs]'")
    assert build_site.build() == []
    reference = (ROOT / "build" / "site" / "reference" / "python.html").read_text(encoding="utf-8")
    assert 'id="metarec.recommender.MetaRecommender.fit"' in reference


def test_the_reference_shows_every_name_that_the_package_exports() -> None:
    import metarec

    shown = {name for _, names in build_site.REFERENCE.values() for name in names}
    for name, home in metarec._HOMES.items():
        assert {home, f"{home}.{name}"} & shown, name


def test_dead_links_lonely_pages_and_foreign_hosts_are_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<a href="a.html#here">1</a><a href="a.html#there">2</a><a href="b.html">3</a>'
    )
    (tmp_path / "a.html").write_text('<h1 id="here">A</h1><a href="https://example.org/x.html">4</a>')
    (tmp_path / "c.html").write_text('<script async src="https://example.org/x.js"></script>')
    assert list(build_site.dead_links(tmp_path)) == [
        "index.html: 'a.html#there' leads to no heading",
        "index.html: 'b.html' leads to no file",
    ]
    assert list(build_site.unreached(tmp_path)) == ["c.html: nothing leads to it"]
    assert [line.split(":")[0] for line in build_site.loaded_from_elsewhere(tmp_path)] == ["c.html"]


def test_docstrings_name_the_arguments_that_there_are(caplog: pytest.LogCaptureFixture) -> None:
    griffe = pytest.importorskip("griffe", reason="griffe is not installed: pip install 'metarec[docs]'")
    package = griffe.load("metarec", search_paths=[ROOT], docstring_parser="google")

    def read(member: Any) -> int:
        members = [found for found in getattr(member, "members", {}).values() if not found.is_alias]
        return len(member.docstring.parsed if member.docstring else ()) + sum(map(read, members))

    with caplog.at_level(logging.WARNING):
        assert read(package) > 1_000
    assert caplog.messages == []
