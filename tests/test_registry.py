"""Names that stand for code: where they are looked for, and what a file may not cause."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from metarec.errors import ConfigError
from metarec.registry import Registry, allow


@pytest.fixture
def registry() -> Registry[object]:
    return Registry("loss", "metarec.test-losses", {"own": len, "lazy": "math:hypot"})


def test_builtin_names_come_first_and_are_imported_when_they_are_asked_for(registry: Registry[object]) -> None:
    assert registry.names() == ["own", "lazy"]
    assert registry.get("own") is len
    assert registry.get("lazy")(3, 4) == 5  # type: ignore[operator]


def test_a_module_attribute_is_imported(registry: Registry[object]) -> None:
    assert registry.get("os:path.join") is os.path.join


def test_a_module_attribute_that_was_used_is_not_listed_as_a_name(registry: Registry[object]) -> None:
    registry.get("os:path.join")
    assert registry.names() == ["own", "lazy"]


def test_checking_a_name_imports_nothing(
    registry: Registry[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.check("never_imported:thing") == "never_imported:thing"
    assert "never_imported" not in sys.modules


def test_an_unknown_name_is_refused_with_the_nearest(registry: Registry[object]) -> None:
    with pytest.raises(ConfigError, match=r"no loss is called 'owm'.*own"):
        registry.get("owm")
    with pytest.raises(ConfigError, match="cannot be imported"):
        registry.get("no_such_module:thing")


def test_a_name_from_a_file_imports_no_code_that_was_not_asked_for(registry: Registry[object]) -> None:
    with pytest.raises(ConfigError, match="code outside metarec"):
        registry.get("os:system", from_file=True)
    asked_for = registry.get("os:getcwd")
    assert registry.get("os:getcwd", from_file=True) is asked_for
    allow("os:getpid")
    assert registry.get("os:getpid", from_file=True) is os.getpid
    with pytest.raises(ConfigError, match="no module:attribute"):
        allow("os.getpid")


def test_an_installed_package_adds_names_by_entry_point(
    registry: Registry[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[metarec.test-losses]\nfocal = toy_losses:focal\n")
    (tmp_path / "toy_losses.py").write_text("def focal():\n    return 'focal'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.names() == ["own", "lazy", "focal"]
    assert registry.get("focal", from_file=True)() == "focal"  # type: ignore[operator]


def test_metarecs_own_names_cannot_be_replaced(registry: Registry[object]) -> None:
    with pytest.raises(ConfigError, match="metarec's own"):
        registry.register("own", max)
    registry.register("mine", max)
    assert registry.get("mine", from_file=True) is max
