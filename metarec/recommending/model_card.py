"""A folder for a model hub: a recommender's files, and a card that says what it is made of and what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from metarec.config import RunConfig, validated
from metarec.errors import ConfigError
from metarec.files.artifacts import load_json, verify_dir
from metarec.files.run_directory import FACTS, RUN_MODEL, TUNED_MODEL, recommender_dir, tuned_model
from metarec.training.fitting import needs_model

_ADAPTED = "metarec, adapted"
_KINDS = (".safetensors", ".json")


def write_hub_folder(run: Path, out: Path) -> None:
    """Writes a recommender and its card into a folder that `MetaRecommender.from_pretrained` and hubs read.

    Args:
        run: The directory of a run that ``metarec evaluate`` has measured.
        out: The folder; it must not exist.

    Raises:
        ConfigError: The run holds no recommender, was not evaluated, or was evaluated on other data; the folder exists.
        ArtifactError: A file of the recommender is damaged.
    """
    model = recommender_dir(run)
    if model is None:
        raise ConfigError(f"'{run}' holds no trained recommender", f"Run: metarec train --name {run.name}")
    if out.exists():
        raise ConfigError(f"'{out}' exists", "Choose another folder")
    measured = run / "table.json"
    if not measured.exists():
        raise ConfigError(
            f"'{run}' was not evaluated, and its card would state no gain", f"Run: metarec evaluate {run}"
        )
    verify_dir(model, "recommender")
    facts, table = load_json(model / FACTS), load_json(measured)
    if table["hashes"].get("data") != facts["hashes"].get("data"):
        raise ConfigError(f"'{measured}' was measured on other data", f"Run: metarec evaluate {run}")
    others = [file.name for file in model.iterdir() if file.suffix not in _KINDS]
    if others:
        raise ConfigError(f"'{others[0]}' is neither safetensors nor JSON", "Save the recommender again")
    tuned = _tuned_model(model, facts["config"])
    if tuned is not None:
        verify_dir(tuned, "model")
    text = model_card(facts, table, hurt_share(run / "per_user.parquet", _most_shots(table)), tuned is not None)
    shutil.copytree(model, out / RUN_MODEL)
    if tuned is not None:
        shutil.copytree(tuned, out / TUNED_MODEL)
    (out / "README.md").write_text(text, encoding="utf-8")


def hurt_share(per_user: Path, shots: int) -> float | None:
    """Returns the share of test users whom `shots` ratings gave a lower AUC than none; None if K = 0 is not there."""
    import pandas as pd

    rows = pd.read_parquet(per_user)
    rows = rows[rows["method"] == _ADAPTED]
    auc = rows.pivot_table(index="user", columns="shots", values="auc")
    if 0 not in auc.columns:
        return None
    both = auc[[0, shots]].dropna()
    return float((both[shots] < both[0]).mean())


def model_card(facts: Mapping[str, Any], table: Mapping[str, Any], hurt: float | None, included: bool = False) -> str:
    """Returns a model card, Markdown under YAML metadata.

    Args:
        facts: What the recommender's directory says of it.
        table: The results of its evaluation, as `Report.to_json` gives them.
        hurt: See `hurt_share`.
        included: Whether the folder holds the language model.
    """
    task, settings = facts["task"], facts["config"]
    reads = needs_model(validated(RunConfig, settings, FACTS))
    local = included or Path(settings["backbone"]).is_dir()
    metadata: dict[str, Any] = {
        "library_name": "metarec",
        "pipeline_tag": "tabular-regression",
        "tags": ["recommender-system", "few-shot", "meta-learning", "cold-start"],
        "license": "other",
        "license_name": str(task["licence"]),
        **({"base_model": settings["backbone"]} if reads and not local else {}),
    }
    most = _most_shots(table)
    rows = [row for row in table["rows"] if row["method"] in (_ADAPTED, table["baseline"])]
    lines = [
        f"| {row['method']} | {row['shots']} | {row['users']} | {row['auc']:.4f} | {_gain(row, table['baseline'])} |"
        for row in rows
    ]
    left = [f"{count} users were left out: {reason}." for reason, count in table["left_out"].items()]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            f"# {task['name']}, by metarec {facts['metarec']}",
            "",
            f"A few-shot recommender. {task['description']} A new person rates a few items; nothing is trained again.",
            "",
            "```python",
            "from metarec import MetaRecommender",
            "",
            'recommender = MetaRecommender.from_pretrained("this folder")',
            "```",
            "",
            "## Data and licences",
            "",
            f"- Ratings: {task.get('origin') or task['dataset']['source']}. Licence: {task['licence']}.",
            "- The catalog's texts are in the folder, the ratings are not.",
            f"- Language model: {_model(settings['backbone'], local, included) if reads else 'none is read'}.",
            "- Ids of people are there as salted digests of 64 bits, so that evaluation leaves these people out. Who "
            "has an id can check whether it was among them.",
            "",
            "## Measured",
            "",
            "On people whom no part of training saw, one fixed query each. AUC, and its paired difference to "
            f"the {table['baseline']} with a 95% interval.",
            "",
            "| method | ratings | people | AUC | difference |",
            "|---|---|---|---|---|",
            *lines,
            "",
            *left,
            "",
            "## Who is worse off",
            "",
            "It was not measured: the task has no users without ratings."
            if hurt is None
            else f"{most} ratings gave {hurt:.0%} of these people a lower AUC than none.",
            "",
            f"Data {table['hashes'].get('data')}, split {table['hashes'].get('split')}, seed {table['seed']}.",
            "",
        ]
    )


def _model(backbone: str, local: bool, included: bool) -> str:
    if included:
        return f"a fine-tuned one, in `{TUNED_MODEL}`"
    return f"read from the directory `{Path(backbone).name}`, which is not in this folder" if local else backbone


def _tuned_model(model: Path, settings: Mapping[str, Any]) -> Path | None:
    """Returns the directory of a fine-tuned model that is found again beside a recommender that was moved."""
    found = Path(tuned_model(model, settings["backbone"]))
    return found if found.name == TUNED_MODEL and found.is_dir() else None


def _most_shots(table: Mapping[str, Any]) -> int:
    return max(int(row["shots"]) for row in table["rows"])


def _gain(row: Mapping[str, Any], baseline: str) -> str:
    if row["method"] == baseline:
        return ""
    return f"{row['auc_gain']:+.4f} [{row['auc_gain_low']:+.4f} {row['auc_gain_high']:+.4f}]"
