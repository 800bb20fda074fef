"""Every command that a page or a help text shows has the verbs, options and arguments that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from metarec.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Pages about what there was.
PAST = {"CHANGELOG.md", "log.md"}
FENCE = re.compile(r"^ *```(?:bash|sh|console)\n(.*?)^ *```", re.M | re.S)
INLINE = re.compile(r"(?<!`)`((?:[A-Z_]+=\S+ )*metarec [a-z][^`]*)`(?!`)")
# What stands for words that the reader chooses.
CHOSEN = re.compile(r"\.\.\.|…|\bNAME\b|\bVERB\b")


def _lines(script: str) -> Iterator[str]:
    """Yields the commands of a script that call metarec."""
    for line in re.sub(r"\\\n\s*", "", script).splitlines():
        for part in re.split(r"&&|\|\||\||;", re.sub(r"\s#.*$", "", line)):
            if found := re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(metarec .*)", part):
                yield found[1]


def _written() -> Iterator[tuple[str, str, bool]]:
    """Yields where each command stands, the command, and whether it is whole."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from ((page.name, line, True) for block in FENCE.findall(text) for line in _lines(block))
        if page.name not in PAST:
            words = [" ".join(found.split()) for found in INLINE.findall(FENCE.sub("", text))]
            yield from ((page.name, line, False) for found in words for line in _lines(found))


def _verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields the verbs below a command."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for verb, one in command.commands.items():
        yield from _verbs(one, f"{name} {verb}")


COMMAND: Any = get_command(app)
VERBS = dict(_verbs(COMMAND, "metarec"))
HELPS = [
    (f"help of {verb}", line, True)
    for verb, command in VERBS.items()
    for line in _lines(re.sub(r"^Examples?: ", "", command.epilog or "", flags=re.M))
]
WRITTEN = sorted(set(_written()))


def wrong(line: str, *, whole: bool) -> str:
    """Returns what the command line would not take of a command; "" where nothing is wrong.

    Args:
        line: The command.
        whole: Whether it has to have all that is required.
    """
    try:
        _, *words = shlex.split(line)
    except ValueError as error:
        return str(error)
    command = COMMAND
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            return ""  # of metarec itself, such as --version
        if words[0] not in command.commands:
            return f"there is no verb '{words[0]}'"
        command = command.commands[words.pop(0)]
    context = command.context_class(command, info_name="metarec")
    try:
        given, extra, _ = command.make_parser(context).parse_args(args=list(words))
    except Exception as error:  # of the parser's own library, which may be vendored
        said = str(getattr(error, "message", error))
        return "" if not whole and "requires an argument" in said else said  # an option by its name alone
    if extra:
        return f"there is no argument '{extra[0]}'"
    if not whole or CHOSEN.search(line):
        return ""
    missing = [one.opts[0] for one in command.params if one.required and given.get(one.name) in (None, (), [])]
    return f"'{missing[0]}' is missing" if missing else ""


def test_there_are_commands_to_check() -> None:
    assert len(WRITTEN) > 150
    assert len(HELPS) >= len(VERBS)


@pytest.mark.parametrize(("place", "line", "whole"), [*WRITTEN, *HELPS])
def test_the_command_line_takes_every_command_that_is_shown(place: str, line: str, whole: bool) -> None:
    assert wrong(line, whole=whole) == "", f"{place}: {line}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("metarec serve runs/x", "there is no argument 'runs/x'"),
        ("metarec store export --vllm", "No such option"),
        ("metarec train --stepz 3", "No such option"),
        ("metarec export --out x", "is missing"),
    ],
)
def test_commands_that_are_not_taken_are_found(line: str, said: str) -> None:
    assert said in wrong(line, whole=True)
