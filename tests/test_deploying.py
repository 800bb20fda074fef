"""The container and what watches it: files that exist, options that there are, no root, pinned versions."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
STEPS = [tuple(line.split(maxsplit=1)) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "metarec.json").read_text(encoding="utf-8"))


def steps(name: str) -> list[str]:
    return [text.strip() for step, text in STEPS if step == name]


def options_of(*words: str) -> set[str]:
    """Returns the options of a verb, or of the one in a group of verbs."""
    import typer

    from metarec.cli import app

    found: Any = typer.main.get_command(app)
    for word in words:
        found = found.commands[word] if hasattr(found, "commands") else found
    return {option for parameter in found.params for option in parameter.opts}


def expressions() -> list[str]:
    rules = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
    return rules + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@pytest.mark.parametrize(
    "image",
    [
        *(text.split()[0] for text in steps("FROM")),
        *(service["image"] for service in COMPOSE["services"].values() if "image" in service),
    ],
)
def test_images_are_pinned_by_version(image: str) -> None:
    assert re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z-]+)?$", image)


def test_the_container_is_not_root_says_its_port_and_its_health() -> None:
    last = [name for name, _ in STEPS][[place for place, (name, _) in enumerate(STEPS) if name == "FROM"][-1] :]
    assert last.index("USER") < last.index("ENTRYPOINT")
    assert steps("USER")[-1] not in ("root", "0")
    assert steps("EXPOSE") == ["8000"]
    assert "/readyz" in steps("HEALTHCHECK")[0]


def test_files_that_are_copied_exist_and_are_in_the_builds_context() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for text in steps("COPY"):
        if not text.startswith("--from"):
            for name in text.split()[:-1]:
                assert (ROOT / name).exists(), name
                assert name in let_in, name


def test_what_containers_run_are_options_that_the_command_line_takes() -> None:
    for command in (json.loads(steps("CMD")[-1]), COMPOSE["services"]["service"]["command"]):
        verb, *arguments = command
        given = {part.partition("=")[0] for part in arguments if part.startswith("--")}
        assert verb == "serve"
        assert "--api-key-file" in given
        assert given <= options_of("serve")


def test_the_commands_of_the_page_are_ones_that_there_are() -> None:
    page = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
    for line in re.findall(r"^metarec .*", page, re.M):
        verb, *arguments = shlex.split(re.split(r" (?:&&|\|) ", line)[0], comments=True)[1:]
        assert {part for part in arguments if part.startswith("--")} <= options_of(verb, *arguments[:1])


def test_the_database_keeps_nothing_erased_and_ports_are_this_machines() -> None:
    assert "wal_recycle=off" in COMPOSE["services"]["database"]["command"]
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    named = {name for service in COMPOSE["services"].values() for name in service.get("secrets", ())}
    assert named == set(COMPOSE["secrets"])
    volumes = {text.partition(":")[0] for service in COMPOSE["services"].values() for text in service["volumes"]}
    assert {name for name in volumes if re.fullmatch(r"\w+", name)} == set(COMPOSE["volumes"])


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    rules: list[Any] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "cure"} == set(rule["annotations"])
    watched = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert watched["rule_files"] == ["alerts.yml"]
    assert watched["scrape_configs"][0]["job_name"] == "metarec"


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_well_formed(expression: str) -> None:
    bare = re.sub(r'"[^"]*"', "", expression)
    for left, right in ("()", "[]", "{}"):
        assert bare.count(left) == bare.count(right)
    counters = re.findall(r"(\w*)\((metarec_\w+_(?:total|bucket))", bare)
    assert all(function in ("rate", "increase") for function, _ in counters)


def test_panels_do_not_overlap() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
