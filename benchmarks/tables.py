"""Writes the tables and pictures of documents from the JSON in ``benchmarks/results/``.

    python benchmarks/tables.py            # writes README.md, docs/benchmark.md and the pictures they show
    python benchmarks/tables.py --check    # exits 1 and names the files that are not what the JSON says

A document holds a table between two comments; what is between them is replaced:

    <!-- table: headline.json rows="metarec; GP" columns="users; s/user" -->
    <!-- end -->

``rows`` are names of rows, with or without the settings behind them (all rows without it); ``columns`` follow the AUC
(names in `metarec.bench.report.COLUMNS`); ``versus`` is the row that differences are to (without it the item mean; else
that of ``metarec report --reference``); ``task`` is needed where the JSON holds several tasks, and ``sizes="each"``
gives one table line per method and size of meta-training. Results of another form are shown line by line, each line a
path in the JSON (``*`` stands for all keys):

    <!-- lines: robustness.json head="disturbance" rows="flipped ratings/*" columns="auc; difference" -->
    <!-- end -->

A picture of the gain over the baseline by K is a block of its own, drawn beside the document:

    <!-- picture: headline.json file="k-shot.svg" rows="metarec; GP" -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from metarec.bench.report import AHEAD, COLUMNS, RowNames, markdown_table
from metarec.bench.summary import REFERENCE, ranked
from metarec.files.artifacts import dump_json, load_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmark.md")
BLOCK = re.compile(
    r"(?P<start><!-- (?P<kind>table|lines|picture): (?P<file>[\w.-]+\.json)(?P<options>(?: \w+=\"[^\"]*\")*) -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.S,
)
_KNOWN = {
    "table": {"rows", "columns", "task", "sizes", "versus"},
    "lines": {"head", "within", "rows", "columns"},
    "picture": {"file", "rows", "task"},
}
_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f", "#e377c2", "#17becf")
_MARKERS = "osD^vPX*"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    check = parser.parse_args(arguments).check
    stale = {path: content for document in DOCUMENTS for path, content in changed(document).items()}
    for path, content in stale.items():
        if not check:
            path.write_text(content(), encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is stale: run python benchmarks/tables.py' if check else 'was written'}")
    return int(check and bool(stale))


def changed(document: Path) -> dict[Path, Callable[[], str]]:
    """Returns what makes the new content of a document and of its pictures, for those that are stale."""
    text = document.read_text(encoding="utf-8")
    try:
        wanted, pictures = written(text, RESULTS)
    except ValueError as error:
        sys.exit(f"{document.relative_to(ROOT)}: {error}")
    stale: dict[Path, Callable[[], str]] = {} if wanted == text else {document: lambda: wanted}
    for file, shown in pictures.items():
        path = document.parent / file
        if not path.exists() or digest(shown) not in path.read_text(encoding="utf-8"):
            stale[path] = partial(picture, shown)
    return stale


def written(text: str, results: Path) -> tuple[str, dict[str, Any]]:
    """Returns a document with its blocks as the results have them, and the curves of its pictures by file name.

    Args:
        text: The document.
        results: Folder of the JSON files.

    Raises:
        ValueError: A block is not closed, or names a row, a task or an option that there is not.
    """
    pictures: dict[str, Any] = {}
    opened = len(re.findall(r"<!-- (?:table|lines|picture):", text))
    if opened != len(BLOCK.findall(text)):
        raise ValueError("a table or picture comment is not closed by <!-- end -->, or not written as it should be")

    def replaced(found: re.Match[str]) -> str:
        if re.search(r"<!-- (?:table|lines|picture):", found["body"]):
            raise ValueError(f"the block of {found['file']} is not closed by <!-- end -->")
        options = dict(re.findall(r'(\w+)="([^"]*)"', found["options"]))
        unknown = sorted(set(options) - _KNOWN[found["kind"]])
        if unknown:
            raise ValueError(f"a {found['kind']} has no option '{unknown[0]}'")
        if found["kind"] == "picture" and "file" not in options:
            raise ValueError("a picture needs the option 'file'")
        content = load_json(results / found["file"])
        if found["kind"] == "table":
            body = table(content, options)
        elif found["kind"] == "lines":
            body = lines_of(content, options)
        else:
            shown = curves(content, options)
            pictures[options["file"]] = shown
            body = f"![{alternative(shown)}]({options['file']})"
        return f"{found['start']}{body}\n{found['end']}"

    return BLOCK.sub(replaced, text), pictures


def table(results: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """Returns a table in Markdown of what a results file says.

    Args:
        results: As ``metarec report --results`` writes it.
        options: A block's options: ``rows``, ``columns``, ``task``, ``sizes``, ``versus``.

    Raises:
        ValueError: A row, a column or the task is not there.
    """
    columns = _names(options["columns"]) if "columns" in options else None
    for column in columns or ():
        if column not in COLUMNS:
            raise ValueError(f"there is no column '{column}', but {', '.join(COLUMNS)}")
    tables = _tables(results, options.get("task"))
    (baseline,) = _full([options.get("versus", results["baseline"])], tables)
    if options.get("sizes") != "each":
        return markdown_table(_chosen(_whole(tables), options), baseline, REFERENCE, columns)
    # One table after another, the first one's head for all, each line with its size in front.
    lines: list[str] = []
    for one in sorted(tables, key=lambda one: one["train_users"] or math.inf):
        size = "all" if one["train_users"] is None else f"{one['train_users']:,}"
        text = markdown_table(_chosen(one, options), baseline, REFERENCE, columns)
        head, rule, *body = [line for line in text.splitlines() if line.startswith("|")]
        lines = lines or [f"| meta-training users {head}", f"|---{rule}"]
        lines += [f"| {size} {line}" for line in body]
    return "\n".join(lines)


def lines_of(results: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """Returns a table in Markdown of numbers in a results file, a line for each path.

    Args:
        results: Any results.
        options: A block's options: ``head`` over the paths, ``rows`` (paths, keys joined by ``/``, ``*`` for all keys
            below which there are more), and ``columns``: keys there. A number has its interval behind it, where
            ``KEY_low`` and ``KEY_high`` are beside it; a ``difference`` or ``shift`` where ``low`` and ``high`` are.
            ``within`` is a key that all paths are below, and that no line names.

    Raises:
        ValueError: There is no such path, or no line has a column.
    """
    columns = _names(options["columns"])
    if "within" in options:
        ((_, results),) = _below(results, [options["within"]], ())
    found = [one for path in _names(options["rows"]) for one in _below(results, path.split("/"), ())]
    for column in columns:
        if not any(column in values for _, values in found):
            raise ValueError(f"no line has a column '{column}'")
    lines = [f"| {' | '.join([options.get('head', ''), *columns])} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(_line(path, values, columns) for path, values in found)])


def _below(values: Any, path: Sequence[str], above: tuple[str, ...]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if not path:
        return [(above, values)]
    head, *rest = path
    if head == "*":
        keys = [key for key, value in values.items() if isinstance(value, dict)]
    elif head in values:
        keys = [head]
    else:
        raise ValueError(f"there is no '{head}' below '{'/'.join(above)}', but {', '.join(values)}")
    return [one for key in keys for one in _below(values[key], rest, (*above, key))]


def _line(path: tuple[str, ...], values: Mapping[str, Any], columns: Sequence[str]) -> str:
    cells = []
    for column in columns:
        value = values.get(column)
        moved = column in ("difference", "shift")
        ends = [values.get("low" if moved else f"{column}_low"), values.get("high" if moved else f"{column}_high")]
        form = "+.3f" if moved else ".3f"
        text = "" if value is None else str(value) if isinstance(value, int | str) else format(value, form)
        cells.append(text if None in ends else f"{text} [{format(ends[0], form)} {format(ends[1], form)}]")
    return f"| {', '.join(path)} | {' | '.join(cells)} |"


def curves(results: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a picture shows: of every row the gain over the baseline and its interval, by K.

    Raises:
        ValueError: A row or the task is not there.
    """
    baseline = results["baseline"]
    whole = _whole(_tables(results, options.get("task")))
    shown: dict[str, Any] = {}
    for name, cells in ranked(_chosen(whole, options), baseline).items():
        if name == baseline:
            continue
        versus = {count: cells[count][f"versus {baseline}"] for count in sorted(cells)}
        shown[name] = {
            str(count): [round(one[key], 6) for key in ("difference", "low", "high")] for count, one in versus.items()
        }
    intervals = results.get("intervals", "over people")
    return {"baseline": baseline, "task": whole["task"], "intervals": intervals, "rows": shown}


def alternative(shown: Mapping[str, Any]) -> str:
    """Returns the text of a picture, for those who do not see it."""
    return f"AUC gained over the {shown['baseline']} by the number of ratings K, of {'; '.join(shown['rows'])}"


def picture(shown: Mapping[str, Any]) -> str:
    """Returns curves with bands as SVG: the same bytes for the same numbers and the same matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "metarec", "font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines["right"].set_visible(False)
        axes.axhline(0, color="#57606a", linewidth=1, linestyle=":")
        places: list[int] = []
        for index, (name, points) in enumerate(shown["rows"].items()):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            places = [int(count) for count in points]
            gains, lows, highs = zip(*points.values(), strict=True)
            axes.plot(places, gains, color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
            axes.fill_between(places, lows, highs, color=colour, alpha=0.12, linewidth=0)
        axes.set_xticks(places)
        axes.set_xlabel("ratings of the user (K)")
        axes.set_ylabel(f"AUC minus that of the {shown['baseline']}")
        axes.set_title(f"{shown['task']}, 95% intervals {shown['intervals']}", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=9)
        stream = StringIO()
        metadata = {"Date": None, "Creator": "benchmarks/tables.py", "Description": f"numbers {digest(shown)}"}
        figure.savefig(stream, format="svg", metadata=metadata)
    # matplotlib leaves spaces at the ends of lines.
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def digest(shown: Mapping[str, Any]) -> str:
    """Returns what a picture carries of the numbers that it was drawn from."""
    return hashlib.sha256(dump_json(shown).encode()).hexdigest()[:16]


def _tables(results: Mapping[str, Any], task: str | None) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(one["task"] for one in results["tables"]))
    if task is None and len(names) > 1:
        raise ValueError(f"there are several tasks; name one of them: {', '.join(names)}")
    if task is not None and task not in names:
        raise ValueError(f"there is no task '{task}', but {', '.join(names)}")
    return [one for one in results["tables"] if task in (None, one["task"])]


def _whole(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the table of all meta-training users, or the only one there is."""
    found = tables if len(tables) == 1 else [one for one in tables if one["train_users"] is None]
    if not found:
        raise ValueError('there is no table of all meta-training users; write sizes="each"')
    return found[0]


def _chosen(one: Mapping[str, Any], options: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the rows of a table that the options name, each with the K from which the reference is ahead of it."""
    ahead = one.get(AHEAD, {})
    rows = [{**row, AHEAD: ahead[row["method"]]} if row["method"] in ahead else row for row in one["rows"]]
    if "rows" not in options:
        return rows
    wanted, known = _full(_names(options["rows"]), [one]), {row["method"] for row in rows}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(f"there is no row '{missing[0]}', but {', '.join(sorted(known))}")
    return [row for row in rows if row["method"] in wanted]


def _full(names: Sequence[str], tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns names of rows with the settings behind them, where a table has one row of a name without them."""
    found = RowNames.of(row for one in tables for row in one["rows"])
    return [found.full(name) for name in names]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
