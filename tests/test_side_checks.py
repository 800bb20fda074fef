"""`data check` and `data describe` look at side information: what is wrong with it is named, with file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Ran

from metarec.data.checks import CODES
from metarec.data.checks.findings import read_for_checks
from metarec.data.checks.side import CODES as SIDE_CODES
from metarec.data.checks.side import check_side
from metarec.data.source_options import SourceOptions
from metarec.data.sources.assembly import Tables


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten users who rate six of ten things each, at home or away."""
    monkeypatch.chdir(tmp_path)
    rows = [
        f"u{user},i{(user + step) % 10},{1 + (user + step) % 5},{'home' if step % 2 else 'away'},fine {step},x"
        for user in range(10)
        for step in range(6)
    ]
    (tmp_path / "orders.csv").write_text("\n".join(["user,item,rating,place,said,same", *rows]) + "\n")
    things = "\n".join(f"i{code},thing {code}" for code in range(10))
    (tmp_path / "items.csv").write_text(f"item,title\n{things}\n")
    return tmp_path


@pytest.fixture
def found(shop: Path, metarec: Callable[..., Ran]) -> Callable[..., dict[str, Any]]:
    def check(*side: str) -> dict[str, Any]:
        given = [word for entry in side for word in ("--side", entry)]
        ran = metarec("data", "check", "orders.csv", "--items-file", "items.csv", "--json", *given)
        assert ran.status == 0, ran.err
        return {
            finding["code"]: finding for finding in json.loads(ran.out)["findings"] if finding["code"] in SIDE_CODES
        }

    return check


Found = Callable[..., dict[str, Any]]


def users_rows(shop: Path, *more: str) -> None:
    rows = [f"u{user},{'ab'[user % 2]},{20 + user},7" for user in range(10)]
    (shop / "users.csv").write_text("\n".join(["user,group,age,seven", *rows[1:], *more]) + "\n")


def test_sound_side_information_has_no_findings(shop: Path, found: Found) -> None:
    (shop / "users.csv").write_text("user,group\n" + "".join(f"u{n},{'ab'[n % 2]}\n" for n in range(10)))
    (shop / "friends.csv").write_text("user,friend\nu1,u2\nu2,u3\n")
    (shop / "graph.csv").write_text("item,relation,other\n" + "".join(f"i{n},maker,m{n % 2}\n" for n in range(10)))
    np.savez(shop / "v.npz", ids=np.array([f"i{n}" for n in range(10)]), vectors=np.eye(10))
    files = ("users=users.csv", "friends=friends.csv", "item_graph=graph.csv", "vectors.v=v.npz")
    assert found(*files, "context=place", "review=said") == {}


def test_fields_of_items_that_tell_none_apart_are_named(shop: Path, found: Found) -> None:
    things = "\n".join(f"i{code},thing {code},north,{'ab'[code % 2]}" for code in range(10))
    (shop / "items.csv").write_text(f"item,title,hall,kind\n{things}\n")
    assert found()["unread-field"]["rows"] == ["'hall (one value)'"]


def test_rows_of_users_are_named(shop: Path, found: Found) -> None:
    users_rows(shop, "", "u3,a,30,7", "zoe,b,30,7")
    findings = found("users=users.csv")
    assert findings["repeated-user"]["rows"] == ["users.csv 12 (u3)"]  # the blank line counts
    assert findings["repeated-user"]["severity"] == "error"
    assert findings["user-not-in-ratings"]["rows"] == ["users.csv 13 (zoe)"]
    assert findings["user-without-row"]["rows"] == ["u0"]
    assert findings["unread-field"]["rows"] == ["'seven (one value)'"]


def test_edges_of_nobody_are_named(shop: Path, found: Found) -> None:
    (shop / "friends.csv").write_text("user,friend,since\nu1,u2,2010\nu2,u1,2010\nu1,bob,2010\nu4,u4,2011\n")
    findings = found("friends=friends.csv")
    assert findings["friend-not-in-ratings"]["rows"] == ["friends.csv 4 (u1 to bob)"]
    assert findings["repeated-edge"]["rows"] == ["friends.csv 3 (u2 to u1)", "friends.csv 5 (u4 to u4)"]
    assert findings["unread-field"]["rows"] == ["'since'"]


def test_edges_of_no_item_are_named(shop: Path, found: Found) -> None:
    rows = [f"i{n},maker,m{n % 2}" for n in range(9)]
    (shop / "graph.csv").write_text("\n".join(["item,relation,other", *rows, "i0,maker,m0", "x,maker,m1", "i1,r,"]))
    findings = found("item_graph=graph.csv")
    assert findings["item-not-in-catalog"]["rows"] == ["graph.csv 12 (x)"]
    assert findings["repeated-edge"]["rows"] == ["graph.csv 11 (i0)", "graph.csv 13 (i1)"]
    assert findings["item-without-edge"]["rows"] == ["i9"]


def test_vectors_of_no_item_and_of_no_numbers_are_named(shop: Path, found: Found) -> None:
    vectors = np.eye(4)
    vectors[1, 1] = np.nan
    np.savez(shop / "v.npz", ids=np.array(["i0", "i1", "i0", "x"]), vectors=vectors)
    findings = found("vectors.v=v.npz")
    assert findings["vector-not-a-number"]["rows"] == ["v.npz 2 (i1)"]
    assert findings["repeated-vector"]["rows"] == ["v.npz 3 (i0)"]
    assert findings["item-not-in-catalog"]["rows"] == ["v.npz 4 (x)"]
    assert findings["item-without-vector"]["count"] == 8


@pytest.mark.parametrize(
    ("values", "said"),
    [([[1.0, 2.0], ["1", "x"]], "row 2, of 'i1', is no vector of 2 numbers"), ([[1.0, 2.0], [1.0]], "row 2, of 'i1'")],
    ids=["a word", "a short one"],
)
def test_a_vector_of_words_is_named_by_its_row(shop: Path, found: Found, values: list[Any], said: str) -> None:
    texts = [list(map(str, row)) for row in values]
    pd.DataFrame({"item": ["i0", "i1"], "vector": texts}).to_parquet(shop / "v.parquet")
    assert said in found("vectors.v=v.parquet")["side-file"]["message"]


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ("users=nobody.csv", "does not exist"),
        ("users=orders2.csv", "row 3 has 3 fields"),
        ("context=hour", "read off timestamps"),
    ],
)
def test_a_file_or_column_that_cannot_be_read_is_one_finding(shop: Path, found: Found, side: str, said: str) -> None:
    (shop / "orders2.csv").write_text("user,age\nu1,20\nu2,21,22\n")
    finding = found(side)["side-file"]
    assert finding["severity"] == "error"
    assert said in finding["message"]


def test_columns_that_a_source_passes_over_are_findings() -> None:
    ratings = pd.DataFrame({"user": ["u"], "item": ["i"], "rating": ["1"], "place": ["home"]})
    data = read_for_checks(Tables(ratings, pd.DataFrame({"item": ["i"], "title": ["t"]}), "a source"))
    findings = check_side(data, Path(), SourceOptions(context=("plaice",), review="text"))
    assert [finding.code for finding in findings] == ["side-file", "side-file"]
    assert findings[0].cure == "Did you mean 'place'?"
    assert "no column 'text', which 'review' names" in findings[1].message


def test_moments_that_are_empty_or_all_the_same_are_named(shop: Path, found: Found) -> None:
    text = (shop / "orders.csv").read_text().replace("home", "", 1)
    (shop / "orders.csv").write_text(text)
    findings = found("context=place,same")
    assert findings["empty-moment"]["rows"] == ["3"]
    assert findings["unread-field"]["rows"] == ["'same (one value)'"]


def test_findings_of_side_information_can_fail_a_check(shop: Path, metarec: Callable[..., Ran]) -> None:
    users_rows(shop, "u3,a,30,7")
    orders = ("data", "check", "orders.csv", "--items-file", "items.csv", "--side", "users=users.csv")
    assert metarec(*orders, "--fail-on", "repeated-user").status == 1
    assert metarec(*orders, "--fail-on", "user-not-in-ratings").status == 0
    assert set(SIDE_CODES) <= set(CODES)
    documented = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{code}`" in documented for code in SIDE_CODES)


def test_a_task_names_its_own_side_information(shop: Path, metarec: Callable[..., Ran]) -> None:
    users_rows(shop, "u3,a,30,7")
    task = {
        "name": "own/shop", "version": 1, "description": "x", "licence": "internal",
        "dataset": {"source": "table", "path": ".", "options": {
            "ratings": "orders.csv", "items": "items.csv", "users": "users.csv"}},
        "split": {"fractions": [0.6, 0.2, 0.2]}, "shots": [0, 1], "query": {"max": 3, "min": 1},
        "label": "rating >= 4", "prompt": {"text": "{{ title }}", "positive": " yes", "negative": " no"},
    }  # fmt: skip
    (shop / "shop.yaml").write_text(json.dumps(task))
    ran = metarec("data", "check", "shop.yaml", "--json")
    assert "repeated-user" in {finding["code"] for finding in json.loads(ran.out)["findings"]}
    refused = metarec("data", "check", "shop.yaml", "--side", "users=users.csv")
    assert refused.status == 2
    assert "'users'" in refused.err


def test_a_description_says_what_is_known_beside_ratings(shop: Path, metarec: Callable[..., Ran]) -> None:
    users_rows(shop, "zoe,b,30,7")
    (shop / "friends.csv").write_text("user,friend\nu1,u2\nu1,bob\n")
    (shop / "graph.csv").write_text("item,relation,other\ni1,maker,m\ni2,maker,m\nx,maker,m\n")
    np.savez(shop / "v.npz", ids=np.array(["i0", "x"]), vectors=np.eye(2, 3))
    files = ("users=users.csv", "friends=friends.csv", "item_graph=graph.csv", "vectors.v=v.npz")
    side = [word for entry in (*files, "context=place", "review=said") for word in ("--side", entry)]
    orders = ("data", "describe", "orders.csv", "--items-file", "items.csv", *side)
    facts = json.loads(metarec(*orders, "--json").out)
    assert facts["users_fields"]["group"] == {"is": "category", "filled": 1.0, "distinct": 2}
    assert facts["users_fields"]["seven"]["is"] == "one value"
    assert facts["friends"] == {"edges": 1, "users": 2}
    assert facts["item_graph"] == {"edges": 2, "relations": 1, "items": 2}
    assert facts["vectors"] == {"v": {"items": 1, "numbers": 3}}
    assert facts["moments"] == {"place": {"is": "category", "filled": 1.0, "distinct": 2}}
    assert facts["reviews"]["filled"] == 1.0
    assert "group: is category, filled 1, distinct 2" in metarec(*orders).out
