"""Tables and pictures of documents are what the committed results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402


def row(method: str, shots: int, auc: float, gain: float | None = None, p_holm: float = 1.0) -> dict[str, Any]:
    versus = {"difference": gain, "low": (gain or 0) - 0.01, "high": (gain or 0) + 0.01, "p_holm": p_holm}
    return {
        "method": method,
        "shots": shots,
        "auc": auc,
        "episodes": 1234,
        "hurt": 0.256,
        "ece": 0.0123,
        "fit_seconds": 99.6,
        "seconds_per_user": 0.5,
        "bytes_per_user": 4096,
        "over no ratings": {"difference": 0.02, "low": -0.001, "high": 0.041},
        **({} if gain is None else {"versus item mean": versus}),
    }


ROWS = [
    row("item mean", 0, 0.6),
    row("item mean", 5, 0.6),
    row("B", 0, 0.59, -0.01),
    row("B", 5, 0.61, 0.01),
    row("metarec", 0, 0.6, 0.0),
    row("metarec", 5, 0.65, 0.05, p_holm=0.001),
]
RESULTS = {
    "baseline": "item mean",
    "tables": [
        {"task": "t/x", "train_users": None, "rows": ROWS, "metarec is ahead from": {"B": 0.0, "item mean": None}},
        {"task": "t/x", "train_users": 60, "rows": ROWS[:4], "metarec is ahead from": {}},
    ],
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "made.json").write_text(json.dumps(RESULTS))
    two = {**RESULTS, "tables": [*RESULTS["tables"], {"task": "t/y", "train_users": None, "rows": ROWS[:4]}]}  # type: ignore[misc]
    (tmp_path / "two.json").write_text(json.dumps(two))
    return tmp_path


def block(body: str = "", *, file: str = "made.json", kind: str = "table", options: str = "") -> str:
    return f"Before.\n\n<!-- {kind}: {file}{options} -->\n{body}<!-- end -->\n\nAfter.\n"


def test_a_table_is_what_is_known_by_hand(results: Path) -> None:
    text, pictures = tables.written(block("old\n"), results)
    assert pictures == {}
    assert text == block(
        "| AUC (difference to item mean) | K = 0 | K = 5 | users | hurt | ECE | fit s | s/user | B/user |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        "| **metarec** | .6000 +.0000 [-.0100 +.0100] | .6500 +.0500* [+.0400 +.0600] "
        "| 1234 | 26% | .012 | 100 | 0.500 | 4,096 |\n"
        "| B | .5900 -.0100 [-.0200 +.0000] | .6100 +.0100 [+.0000 +.0200] "
        "| 1234 | 26% | .012 | 100 | 0.500 | 4,096 |\n"
        "| item mean | .6000 | .6000 | 1234 | 26% | .012 | 100 | 0.500 | 4,096 |\n"
    )
    assert tables.written(text, results)[0] == text, "writing twice changes nothing"


def test_a_table_has_the_rows_and_columns_that_its_comment_names(results: Path) -> None:
    options = ' rows="item mean; B" columns="over no ratings; metarec is ahead from"'
    text, _ = tables.written(block(options=options), results)
    head, _, first, last = text.splitlines()[3:7]
    assert head == "| AUC (difference to item mean) | K = 0 | K = 5 | over no ratings | metarec is ahead from |"
    assert first.startswith("| B |")
    assert first.endswith("| +.0200 [-.0010 +.0410] | K = 0.0 |")
    assert last.startswith("| item mean |")
    assert last.endswith("| never |")


def test_lines_are_numbers_of_a_results_file_with_their_intervals(results: Path) -> None:
    shares = {"0.1": {"auc": 0.7, "difference": -0.01, "low": -0.02, "high": 0.0}, "0.3": {"auc": 0.65, "users": 12}}
    asked = {"q": {"recall@10": 0.5, "recall@10_low": 0.25, "recall@10_high": 0.75}}
    (results / "other.json").write_text(json.dumps({"flipped": {**shares, "note": 3}, "search": asked}))
    options = ' head="share" rows="flipped/*; search/q" columns="auc; difference; users; recall@10"'
    text, _ = tables.written(block(file="other.json", kind="lines", options=options), results)
    assert text.splitlines()[3:-3] == [
        "| share | auc | difference | users | recall@10 |",
        "|---|---|---|---|---|",
        "| flipped, 0.1 | 0.700 | -0.010 [-0.020 +0.000] |  |  |",
        "| flipped, 0.3 | 0.650 |  | 12 |  |",
        "| search, q |  |  |  | 0.500 [0.250 0.750] |",
    ]
    inside, _ = tables.written(
        block(file="other.json", kind="lines", options=' within="flipped" rows="*" columns="auc"'), results
    )
    assert inside.splitlines()[5:-3] == ["| 0.1 | 0.700 |", "| 0.3 | 0.650 |"]
    for wrong, said in (("flip/*", "no 'flip'"), ("flipped/*/x", "no 'x' below 'flipped/0.1'")):
        with pytest.raises(ValueError, match=said):
            tables.written(block(file="other.json", kind="lines", options=f' rows="{wrong}" columns="auc"'), results)
    with pytest.raises(ValueError, match="no line has a column 'acu'"):
        tables.written(block(file="other.json", kind="lines", options=' rows="flipped/*" columns="acu"'), results)


def test_differences_are_to_the_row_that_a_comment_names(results: Path) -> None:
    rows = [{**row, "versus B": row["versus item mean"]} for row in ROWS if row["method"] == "metarec"]
    others = [row for row in ROWS if row["method"] == "B"]
    (results / "b.json").write_text(
        json.dumps({**RESULTS, "tables": [{**RESULTS["tables"][0], "rows": rows + others}]})
    )
    head, _, first, *_ = tables.written(block(file="b.json", options=' versus="B"'), results)[0].splitlines()[3:]
    assert head.startswith("| AUC (difference to B) |")
    assert "+.0500* [+.0400 +.0600]" in first


def test_settings_stand_below_a_table_where_names_without_them_tell_rows_apart(results: Path) -> None:
    def with_settings(name: str, **settings: int) -> list[dict[str, Any]]:
        behind = f" [{', '.join(f'{key}={value}' for key, value in settings.items())}]"
        return [{**row(name + behind, count, 0.6, 0.0), "settings": settings} for count in (0, 5)]

    rows = [*ROWS[:2], *with_settings("B", steps=3), *with_settings("C", steps=3), *with_settings("C", steps=3, rate=4)]
    made = {**RESULTS, "tables": [{**RESULTS["tables"][0], "rows": rows}]}
    (results / "set.json").write_text(json.dumps(made))
    text = tables.written(block(file="set.json"), results)[0]
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        "item mean",
        "B",
        "C",
        "C [rate=4]",
    ]
    assert "\nRows that read these settings have steps=3.\n" in text
    text = tables.written(block(file="set.json", options=' rows="B; item mean"'), results)[0]
    assert "| B |" in text
    rows = [*ROWS[:2], *with_settings("B", steps=3), *with_settings("C", steps=4)]
    (results / "set.json").write_text(json.dumps({**RESULTS, "tables": [{**RESULTS["tables"][0], "rows": rows}]}))
    assert "\nSettings of B: steps=3. Of C: steps=4.\n" in tables.written(block(file="set.json"), results)[0]


def test_sizes_of_meta_training_are_lines_of_one_table(results: Path) -> None:
    text, _ = tables.written(block(options=' sizes="each" rows="B; item mean"'), results)
    lines = text.splitlines()[3:-3]
    assert lines[0].startswith("| meta-training users | AUC")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" 60 ", " B "],
        [" 60 ", " item mean "],
        [" all ", " B "],
        [" all ", " item mean "],
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (block(options=' rows="metarec; GP"'), "no row 'GP', but B, item mean, metarec"),
        (block(options=' row="metarec"'), "no option 'row'"),
        (block(options=' columns="speed"'), "no column 'speed'"),
        (block(file="two.json"), "several tasks; name one of them: t/x, t/y"),
        (block(file="two.json", options=' task="t/z"'), "no task 't/z'"),
        (block().replace("<!-- end -->", ""), "not closed"),
        (block().replace("<!-- end -->", "") + block(), "not closed"),
        (block(kind="picture", options=' rows="B"'), "needs the option 'file'"),
    ],
)
def test_a_block_that_cannot_be_written_says_why(text: str, said: str, results: Path) -> None:
    with pytest.raises(ValueError, match=said):
        tables.written(text, results)


def test_a_picture_shows_the_gains_and_carries_its_numbers(results: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ' file="k.svg" rows="metarec; B; item mean"'
    text, pictures = tables.written(block(kind="picture", options=options), results)
    assert "![AUC gained over the item mean by the number of ratings K, of metarec; B](k.svg)" in text
    shown = pictures["k.svg"]
    assert shown["rows"] == {
        "metarec": {"0": [0.0, -0.01, 0.01], "5": [0.05, 0.04, 0.06]},
        "B": {"0": [-0.01, -0.02, 0.0], "5": [0.01, 0.0, 0.02]},
    }
    drawn = tables.picture(shown)
    assert drawn == tables.picture(shown)
    assert tables.digest(shown) in drawn
    assert "<dc:date>" not in drawn
    other = {**shown, "rows": {"B": shown["rows"]["B"]}}
    assert tables.digest(other) not in drawn


def test_the_check_names_what_is_stale_and_writes_nothing(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = results / "README.md"
    document.write_text(block())
    for name, value in {"ROOT": results, "RESULTS": results, "DOCUMENTS": (document,)}.items():
        monkeypatch.setattr(tables, name, value)
    assert tables.main(["--check"]) == 1
    assert "README.md is stale" in capsys.readouterr().out
    assert document.read_text() == block()
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0


def test_the_committed_documents_are_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_has_one_short_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 6 << 10
    (found,) = [block for block in tables.BLOCK.finditer(readme) if block.group().startswith("<!-- table")]
    assert len(found["body"].strip().splitlines()) <= 2 + 6
