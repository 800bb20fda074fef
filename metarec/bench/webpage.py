"""Renders a benchmark as one HTML file: tables, charts, a few users' prompts and predictions.

The page fetches nothing: plotly's script, which draws the charts, is inside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from metarec.bench.summary import Summary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


_TEMPLATE = Path(__file__).with_name("webpage.html")
_SHOWN_USERS = 3


def render(summaries: Sequence[Summary], reference: str) -> str:
    """Returns a page with all tables, charts and examples, as HTML.

    Args:
        summaries: A benchmark's groups of cells; those of limited meta-training become one comparison.
        reference: The method whose users' gains are drawn, and that every other is compared with.
    """
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    whole = [group for group in summaries if group.train_users is None]
    sections = [_section(group, reference) for group in whole]
    sizes = _sizes(summaries, reference)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        sections=sections,
        sizes=sizes,
        baseline=summaries[0].report.baseline,
        reference=reference,
        plotly=get_plotlyjs(),
        examples=_script_json({group.task: _examples(group, reference) for group in whole}),
    )


def _script_json(value: Any) -> str:
    """Returns JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _section(group: Summary, reference: str) -> dict[str, Any]:
    methods, baseline = group.ranked(reference), group.report.baseline
    shots = sorted(next(iter(methods.values())))
    charts = [
        ("How much K ratings gain", _curves(methods, baseline)),
        ("Cost against quality", _costs(methods, baseline, shots[-1])),
    ]
    if reference in methods:
        charts.append((f"Who gains and who loses: {reference}", _histogram(group, baseline, reference, shots)))
    if f"{reference}, no adaptation" in methods and _between(group):
        charts.append(("Step by step: adaptation's trajectory", _trajectory(group, reference, shots)))
    return {
        "task": group.task,
        "shots": shots,
        "methods": list(methods.items()),
        "left_out": dict(group.report.left_out),
        "charts": [{"title": title, "figure": _script_json(_plain(figure))} for title, figure in charts],
    }


def _plain(figure: Figure) -> Any:
    return json.loads(figure.to_json())


def _figure(x: str, y: str) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="plotly_white", xaxis_title=x, yaxis_title=y, height=460, margin={"l": 60, "r": 10, "t": 10, "b": 50}
    )
    return figure


def _curves(methods: dict[str, dict[int, Any]], baseline: str) -> Figure:
    figure = _figure("ratings of the user (K)", f"AUC minus {baseline}")
    for name, cells in methods.items():
        if name == baseline:
            continue
        versus = [cells[count][f"versus {baseline}"] for count in sorted(cells)]
        figure.add_scatter(
            x=sorted(cells),
            y=[entry["difference"] for entry in versus],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [entry["high"] - entry["difference"] for entry in versus],
                "arrayminus": [entry["difference"] - entry["low"] for entry in versus],
            },
            name=name,
            mode="lines+markers",
        )
    figure.add_hline(y=0, line_dash="dot")
    return figure


def _costs(methods: dict[str, dict[int, Any]], baseline: str, shots: int) -> Figure:
    figure = _figure(f"seconds per user at K = {shots}", f"AUC minus {baseline} at K = {shots}")
    for name, cells in methods.items():
        if name == baseline:
            continue
        row = cells[shots]
        figure.add_scatter(
            x=[row["seconds_per_user"]],
            y=[row[f"versus {baseline}"]["difference"]],
            name=name,
            mode="markers+text",
            text=[name],
            textposition="top center",
            marker={"size": float(8 + 3 * np.log10(1 + row["bytes_per_user"]))},
            hovertext=f"fit {row['fit_seconds']:.0f} s, {row['bytes_per_user']:,} bytes a user, "
            f"{row['parameters']:,} parameters, {row['tokens']:.0f} tokens a request",
        )
    figure.update_xaxes(type="log")
    figure.update_layout(showlegend=False)
    return figure


def _histogram(group: Summary, baseline: str, reference: str, shots: Sequence[int]) -> Figure:
    figure = _figure(f"AUC of {reference} minus {baseline}, by user", "users")
    for count in shots:
        gains = group.report.paired(reference, count, baseline, count)
        figure.add_histogram(x=gains.to_numpy().tolist(), name=f"K = {count}", opacity=0.55, xbins={"size": 0.02})
    figure.update_layout(barmode="overlay")
    figure.add_vline(x=0, line_dash="dot")
    return figure


def _between(group: Summary) -> list[tuple[int, str]]:
    """Returns the inner steps between none and all that were measured with the default settings, and their names."""
    measured = group.methods.items()
    return sorted((row.step, name) for name, row in measured if row.step is not None and not row.settings)


def _trajectory(group: Summary, reference: str, shots: Sequence[int]) -> Figure:
    figure = _figure("inner steps", "AUC")
    between = _between(group)
    steps = [(0, f"{reference}, no adaptation"), *between, (len(between) + 1, reference)]
    # All points are of the users that the steps in between were measured on.
    shown = group.report.values(between[0][1], shots[0]).index
    for count in shots:
        figure.add_scatter(
            x=[step for step, _ in steps],
            y=[float(group.report.values(name, count).reindex(shown).mean()) for _, name in steps],
            name=f"K = {count}",
            mode="lines+markers",
        )
    figure.update_xaxes(dtick=1)
    return figure


def _sizes(summaries: Sequence[Summary], reference: str) -> list[dict[str, Any]]:
    """Returns, per task measured with limited meta-training, the comparison over its size and over K."""
    tasks = dict.fromkeys(group.task for group in summaries if group.train_users is not None)
    return [_by_size(task, [group for group in summaries if group.task == task], reference) for task in tasks]


def _by_size(task: str, groups: Sequence[Summary], reference: str) -> dict[str, Any]:
    ordered = sorted(groups, key=lambda group: math.inf if group.train_users is None else group.train_users)
    sizes = ["all" if group.train_users is None else f"{group.train_users:,}" for group in ordered]
    names = [
        name
        for name, method in ordered[0].methods.items()
        if method.step is None and all(name in group.methods for group in ordered)
    ]
    shots = sorted({int(count) for count in ordered[0].report.costs["shots"]})
    figure = _figure("meta-training users", "AUC")
    for name in names:
        for count in (shots[0], shots[-1]):
            figure.add_scatter(
                x=sizes,
                y=[group.curve(name)[count] for group in ordered],
                name=f"{name}, K = {count}",
                mode="lines+markers",
                line={"dash": "dot" if count == shots[0] else "solid"},
            )
    figure.update_xaxes(type="category")
    table = [
        {
            "method": name,
            "train_users": size,
            "auc": group.curve(name),
            "fit_seconds": group.methods[name].fit_seconds,
            "parameters": group.methods[name].parameters,
            "crossing": group.crossings(reference).get(name),
        }
        for name in names
        for size, group in zip(sizes, ordered, strict=True)
    ]
    return {"task": task, "shots": shots, "rows": table, "figure": _script_json(_plain(figure))}


def _examples(group: Summary, reference: str) -> dict[str, Any]:
    """Returns a few users' candidates with every method's scores, and the prompts that were read."""
    table = group.report.predictions
    if reference not in group.methods:
        reference = next(iter(group.methods))
    users = list(dict.fromkeys(table.loc[table["method"] == reference, "user"]))[:_SHOWN_USERS]
    shown: dict[str, Any] = {}
    for user in users:
        rows = table[table["user"] == user]
        prompts = {name: dict(method.prompts[user]) for name, method in group.methods.items() if user in method.prompts}
        scores: dict[str, dict[str, dict[str, float]]] = {}
        for (method, count), part in rows.groupby(["method", "shots"], sort=False):
            by_item = dict(zip(part["item"], part["score"].round(4).astype(float), strict=True))
            scores.setdefault(str(method), {})[str(count)] = by_item
        rated = rows.drop_duplicates("item")
        ratings = dict(zip(rated["item"], rated["rating"].astype(float), strict=True))
        shown[user] = {"ratings": ratings, "scores": scores, "prompts": prompts}
    return shown
