"""A folder for a hub holds safetensors and JSON, and a card that says what was measured and who is worse off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from metarec.files.artifacts import replace_dir
from metarec.recommending.model_card import hurt_share, model_card

TASK = {"name": "shop/user-cold", "description": "People of a shop.", "licence": "CC0", "dataset": {"source": "table"}}
FACTS = {
    "metarec": "0.1.0",
    "task": TASK,
    "config": {"score": ["item mean", "adapter"], "backbone": "tiny-model"},
    "hashes": {"data": "d1", "split": "s1"},
}


def row(method: str, shots: int, auc: float, gain: float) -> dict[str, Any]:
    ends = {"auc_gain": gain, "auc_gain_low": gain - 0.01, "auc_gain_high": gain + 0.01}
    return {"method": method, "shots": shots, "users": 4, "auc": auc, **ends}


TABLE = {
    "baseline": "item mean",
    "seed": 3,
    "left_out": {"too few ratings": 2},
    "hashes": {"data": "d1", "split": "s1"},
    "rows": [
        row("item mean", 5, 0.6, 0.0),
        row("metarec, adapted", 0, 0.6, 0.0),
        row("metarec, adapted", 5, 0.65, 0.05),
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was evaluated: adapting lowered the AUC of one user of four."""
    run = tmp_path / "run"
    run.mkdir()
    with replace_dir(run / "model", "recommender") as directory:
        (directory / "recommender.json").write_text(json.dumps(FACTS))
        (directory / "meta.safetensors").write_bytes(b"weights")
    (run / "table.json").write_text(json.dumps(TABLE))
    users = [("a", 0.5, 0.6), ("b", 0.5, 0.7), ("c", 0.5, 0.5), ("d", 0.5, 0.4)]
    rows = [
        ("metarec, adapted", shots, user, auc) for user, *both in users for shots, auc in zip((0, 5), both, strict=True)
    ]
    pd.DataFrame(rows, columns=["method", "shots", "user", "auc"]).to_parquet(run / "per_user.parquet")
    return run


def test_a_card_states_data_licence_gains_with_intervals_and_who_is_worse_off(
    run: Path, tmp_path: Path, metarec: Callable[..., Any]
) -> None:
    ran = metarec("hub", run, "--out", tmp_path / "hub")
    assert ran.status == 0, ran.err
    card = (tmp_path / "hub" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["library_name"], metadata["license_name"], metadata["base_model"]) == (
        "metarec",
        "CC0",
        "tiny-model",
    )
    assert "| metarec, adapted | 5 | 4 | 0.6500 | +0.0500 [+0.0400 +0.0600] |" in card
    assert "5 ratings gave 25% of these people a lower AUC than none" in card
    assert "2 users were left out: too few ratings." in card


def test_a_hub_folder_holds_safetensors_and_json_and_loads_as_a_run(
    run: Path, tmp_path: Path, metarec: Callable[..., Any]
) -> None:
    from metarec.files.run_directory import recommender_dir

    metarec("hub", run, "--out", tmp_path / "hub")
    kinds = {file.suffix for file in (tmp_path / "hub").rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".json", ".md"}
    assert recommender_dir(tmp_path / "hub") == tmp_path / "hub" / "model"


def test_a_fine_tuned_model_is_in_the_folder_and_named_on_the_card(
    run: Path, tmp_path: Path, metarec: Callable[..., Any]
) -> None:
    tuned = {"score": ["item mean", "history"], "backbone": str(run / "backbone")}
    with replace_dir(run / "model", "recommender") as directory:
        (directory / "recommender.json").write_text(json.dumps({**FACTS, "config": tuned}))
    with replace_dir(run / "backbone", "model") as directory:
        (directory / "model.safetensors").write_bytes(b"tuned")
    assert metarec("hub", run, "--out", tmp_path / "hub").status == 0
    assert (tmp_path / "hub" / "backbone" / "model.safetensors").read_bytes() == b"tuned"
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Language model: a fine-tuned one, in `backbone`." in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_a_card_says_which_model_is_not_in_the_folder(tmp_path: Path) -> None:
    local = {"score": ["item mean", "history"], "backbone": str(tmp_path)}
    assert f"read from the directory `{tmp_path.name}`, which is not in this folder" in model_card(
        {**FACTS, "config": local}, TABLE, 0.25
    )
    none = model_card({**FACTS, "config": local | {"score": ["item mean"]}}, TABLE, 0.25)
    assert "Language model: none is read." in none


def test_where_no_user_was_measured_without_ratings_the_card_says_so(run: Path) -> None:
    rows = pd.read_parquet(run / "per_user.parquet")
    rows[rows["shots"] > 0].to_parquet(run / "per_user.parquet")
    assert hurt_share(run / "per_user.parquet", 5) is None
    assert "It was not measured" in model_card(FACTS, TABLE, None)


def test_users_whose_auc_stays_are_not_counted_as_worse_off(run: Path) -> None:
    assert hurt_share(run / "per_user.parquet", 5) == 0.25


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "table.json").unlink(), "was not evaluated"),
        (
            lambda run: (run / "table.json").write_text(json.dumps({**TABLE, "hashes": {"data": "d2"}})),
            "was measured on other data",
        ),
        (lambda run: (run / "model" / "meta.safetensors").write_bytes(b"others!"), "meta.safetensors"),
    ],
)
def test_what_a_card_could_not_state_truly_is_refused(
    spoil: Callable[[Path], Any], message: str, run: Path, tmp_path: Path, metarec: Callable[..., Any]
) -> None:
    spoil(run)
    ran = metarec("hub", run, "--out", tmp_path / "hub")
    assert ran.status == 2
    assert message in ran.err
    assert not (tmp_path / "hub").exists()
