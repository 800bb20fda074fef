"""Writes what an evaluation or a benchmark found for people: terminal tables, Markdown and plain sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from metarec.bench.settings import label
from metarec.bench.summary import REFERENCE, Summary, ranked
from metarec.data.user_groups import GROUPINGS
from metarec.evaluation.metric_names import BEYOND, CUTOFF, GROUPED, METRICS, POOLED, has_interval
from metarec.evaluation.report import Report, ShotSummary
from metarec.scorer import OwnLikeShare

_SIGNIFICANT = 0.05
# Metrics that a column shows, each with its interval.
_GROUPS = tuple(f"{GROUPED}{name}:{group}" for name, groups in GROUPINGS.items() for group in groups)
_SHOWN = (*(metric for metric in BEYOND if not metric.startswith(GROUPED)), *_GROUPS)
# Key of a table in a results file, and of a row that a column shows it of.
AHEAD = f"{REFERENCE} is ahead from"
# What a table can say of a row at the largest K, by the column's head.
COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "users": lambda row: str(row["episodes"]),
    "hurt": lambda row: f"{row['hurt']:.0%}",
    "ECE": lambda row: _short(row["ece"], ".3f"),
    "over no ratings": lambda row: _difference(row["over no ratings"]),
    "fit s": lambda row: f"{row['fit_seconds']:.0f}",
    "s/user": lambda row: f"{row['seconds_per_user']:.3f}",
    "B/user": lambda row: f"{row['bytes_per_user']:,}",
    "parameters": lambda row: f"{row['parameters']:,}",
    "tokens": lambda row: f"{row['tokens']:,.0f}",
    **{metric: partial(lambda metric, row: _between(row, metric), metric) for metric in _SHOWN},
    AHEAD: lambda row: _crossing(row[AHEAD]) if AHEAD in row else "",
}
USUAL_COLUMNS = ("users", "hurt", "ECE", "fit s", "s/user", "B/user")


def table(report: Report) -> Table:
    """Returns one row per method and one column per K, with the paired difference to the baseline in every cell."""
    cells = list(report.cells())
    shots = sorted({cell.shots for cell in cells})
    users = cells[0].users
    result = Table(title=f"{users} users never seen in training, one fixed query each", title_justify="left")
    result.add_column("method")
    result.add_column("")
    for count in shots:
        result.add_column(f"K = {count}", justify="right", no_wrap=True)
    more = [metric for metric in report.metrics if metric not in METRICS]
    paired = (f"AUC - {report.baseline}", "95% interval", "seconds/user", "bytes/user")
    further = [line for metric in more for line in (metric, *(("95% interval",) if has_interval(metric) else ()))]
    labels = ("AUC", f"nDCG@{CUTOFF}", *further, *paired)
    for method in dict.fromkeys(cell.method for cell in cells):
        row = {cell.shots: cell for cell in cells if cell.method == method}
        columns = ["\n".join(_lines(row[count], report.baseline)) for count in shots]
        result.add_row(method, "\n".join(labels), *columns, end_section=True)
    return result


def _lines(cell: ShotSummary, baseline: str) -> Sequence[str]:
    low, high = cell.interval
    paired = ("", "") if cell.method == baseline else (f"{cell.gain:+.4f}", f"{low:+.4f} {high:+.4f}")
    return (
        f"{cell.means['auc']:.4f}",
        *(line for metric in cell.means if metric != "auc" for line in _values(cell, metric)),
        *paired,
        f"{cell.seconds_per_user:.4f}",
        f"{cell.bytes_per_user:,}",
    )


def _values(cell: ShotSummary, metric: str) -> list[str]:
    """Returns a metric's value, and of a metric of the table its interval."""
    ends = cell.intervals.get(metric)
    return [f"{cell.means[metric]:.4f}", *([] if ends is None else [f"{ends[0]:.4f} {ends[1]:.4f}"])]


# Characters that a name, a K with its interval, and the costs take in `standings`.
_NAME_WIDTH, _SHOTS_WIDTH, _COSTS_WIDTH = 24, 18, 36
# Metrics beside the AUC that `standings` shows, however narrow it is.
_LEAST_METRICS = 3


@dataclass(frozen=True)
class RowNames:
    """How rows are called where they are shown, and what their settings are.

    Args:
        shown: Name of a row to what stands in its line: without the settings that all rows of its method share.
        note: The settings that are left out of names, in words; "" where there are none.
    """

    shown: Mapping[str, str]
    note: str

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> RowNames:
        """Returns the names of rows, as `Summary.rows` gives them."""
        settings = {row["method"]: dict(row.get("settings", {})) for row in rows}
        alike: dict[str, list[str]] = {}
        for name, own in settings.items():
            alike.setdefault(name.removesuffix(label(own)), []).append(name)
        shown: dict[str, str] = {}
        left_out: dict[str, list[str]] = {}
        for plain, names in alike.items():
            first = settings[names[0]].items()
            shared = {key: value for key, value in first if all(settings[name].get(key) == value for name in names)}
            for name in names:
                shown[name] = plain + label({key: value for key, value in settings[name].items() if key not in shared})
            if shared:
                left_out.setdefault(label(shared).strip(" []"), []).append(plain)
        if len(left_out) == 1:
            return cls(shown, f"Rows that read these settings have {next(iter(left_out))}")
        parts = [f"{'; '.join(names)}: {text}" for text, names in left_out.items()]
        return cls(shown, f"Settings of {'. Of '.join(parts)}" if parts else "")

    def full(self, name: str) -> str:
        """Returns the whole name of the row that is shown by a name; the name itself where none is."""
        return next((whole for whole, short in self.shown.items() if short == name), name)


def standings(summary: Summary, reference: str | None = None, width: int = 140, crossed: bool = False) -> Table:
    """Returns a benchmark's table: a line per method, most gained at the largest K first, a column per K.

    Args:
        summary: The cells of one task.
        reference: The method that every other is compared with beside the baseline.
        width: Characters that the table may take; a narrow one leaves costs out, and says so.
        crossed: See `Summary.rows`.
    """
    by_method = summary.ranked(reference, crossed)
    shots = sorted(next(iter(by_method.values())))
    size = "" if summary.train_users is None else f", {summary.train_users} meta-training users"
    result = Table(title=f"{summary.task}{size}: AUC, and the paired difference to the {summary.report.baseline}")
    result.add_column("method")
    for count in shots:
        result.add_column(f"K = {count}", justify="right", no_wrap=True)
    further = [metric for metric in summary.report.metrics if metric not in METRICS]
    room = (width - _NAME_WIDTH) // _SHOTS_WIDTH - len(shots)
    more = further[: max(room, _LEAST_METRICS)]
    names = RowNames.of(cells[shots[-1]] for cells in by_method.values())
    wide = width >= _NAME_WIDTH + _SHOTS_WIDTH * (len(shots) + len(more)) + _COSTS_WIDTH
    for column in (*more, *(("hurt\nECE", "fit s\ns/user", "users\nB/user") if wide else ())):
        result.add_column(column, justify="right", no_wrap=True)
    for cells in by_method.values():
        last = cells[shots[-1]]
        versus = f"versus {summary.report.baseline}"
        texts = [
            f"{cells[count]['auc']:.4f} " + (_paired(cells[count][versus]) if versus in last else "") for count in shots
        ]
        costs = (
            f"{last['hurt']:.0%}\n{last['ece']:.3f}",
            f"{last['fit_seconds']:.1f}\n{last['seconds_per_user']:.4f}",
            f"{last['episodes']}\n{last['bytes_per_user']:,}",
        )
        shown = [_with_ends(last, metric) for metric in more]
        result.add_row(names.shown[last["method"]], *texts, *shown, *(costs if wide else ()))
    over = "people and items" if crossed else "people"
    caption = f"95% intervals over {over}; * differs after Holm's correction (signed ranks, 5%)"
    hidden = "costs need a wider terminal, or --json"
    result.caption = f"{caption}; {'hurt: users worse off than at K = 0' if wide else hidden}"
    result.caption += f"; {', '.join(more)} at K = {shots[-1]}" if more else ""
    hidden_metrics = further[len(more) :]
    result.caption += f"; in --json: {', '.join(hidden_metrics)}" if hidden_metrics else ""
    result.caption += f". {names.note}" if names.note else ""
    return result


def _paired(versus: Mapping[str, float]) -> str:
    """Returns a paired difference and, below it, its interval."""
    star = "*" if versus["p_holm"] < _SIGNIFICANT else " "
    return f"\n{versus['difference']:+.4f}{star}\n{versus['low']:+.4f} {versus['high']:+.4f}"


def _with_ends(row: Mapping[str, Any], metric: str) -> str:
    """Returns a metric's value, with its interval where the row has one."""
    value = f"{row[metric]:.4f}"
    if f"{metric}_low" not in row:
        return value
    return f"{value}\n{row[f'{metric}_low']:.4f} {row[f'{metric}_high']:.4f}"


def markdown(summary: Summary, reference: str | None = None, crossed: bool = False) -> str:
    """Returns a benchmark's table in Markdown, as `markdown_table` writes it.

    Args:
        summary: The cells of one task.
        reference: The method whose name is set in bold.
        crossed: See `Summary.rows`.
    """
    return markdown_table(summary.rows(reference, crossed), summary.report.baseline, reference)


def markdown_table(
    rows: Sequence[dict[str, Any]], baseline: str, reference: str | None = None, columns: Sequence[str] | None = None
) -> str:
    """Returns rows of a benchmark as a table in Markdown, most gained at the largest K first.

    Args:
        rows: One per method and K, as `Summary.rows` gives them.
        baseline: The row that gains are measured from.
        reference: The method whose name is set in bold.
        columns: Names in `COLUMNS` of what follows the AUC; None for the usual ones.

    Returns:
        One line per method: AUC by K with the paired difference to the baseline and its 95% interval, then the columns
        at the largest K.
    """
    by_method = ranked(rows, baseline)
    shots = sorted({count for cells in by_method.values() for count in cells})
    chosen = USUAL_COLUMNS if columns is None else tuple(columns)
    names = RowNames.of(cells[shots[-1]] for cells in by_method.values())
    first = f"AUC (difference to {names.shown.get(baseline, baseline)})"
    heads = [first, *(f"K = {count}" for count in shots), *chosen]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cells in by_method.values():
        last = cells[shots[-1]]
        name = names.shown[last["method"]]
        name = f"**{name}**" if last["method"] == reference else name
        texts = [_markdown_cell(cells[count], f"versus {baseline}") for count in shots]
        lines.append(f"| {' | '.join([name, *texts, *(COLUMNS[column](last) for column in chosen)])} |")
    note = [f"\n{names.note}."] if names.note else []
    return "\n".join([*lines, *note])


def _markdown_cell(row: Mapping[str, Any], versus: str) -> str:
    text = _short(row["auc"], ".4f")
    return f"{text} {_difference(row[versus])}" if versus in row else text


def _between(row: Mapping[str, Any], metric: str) -> str:
    """Returns a metric's value with its interval; nothing where the row has none."""
    if row.get(metric) is None:
        return ""
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    form = ".3f" if row[metric] < 1 else ".2f"
    return f"{_short(row[metric], form)} [{_short(low, form)} {_short(high, form)}]"


def _crossing(shots: float | None) -> str:
    return "never" if shots is None else f"K = {shots:.1f}"


def _difference(one: Mapping[str, float]) -> str:
    star = "*" if one.get("p_holm", 1.0) < _SIGNIFICANT else ""
    return f"{_short(one['difference'], '+.4f')}{star} [{_short(one['low'], '+.4f')} {_short(one['high'], '+.4f')}]"


def _short(value: float | None, form: str) -> str:
    """Formats a number without the zero before the point; one that is not defined is nothing."""
    if value is None or value != value:
        return ""
    return re.sub(r"(?<!\d)0(?=[.])", "", format(value, form))


def findings(report: Report, adapted: str, unadapted: str) -> list[str]:
    """Returns sentences that say what adapting did, whichever way it went."""
    most = int(report.costs["shots"].max())
    others = [name for name in dict.fromkeys(report.costs["method"]) if name != OwnLikeShare.name]
    if len(report.values(adapted, most)) == 0:
        return [*_pooled(report, adapted, most), *_left_out(report)]
    best = max(
        (name for name in others if name not in (adapted, unadapted)),
        key=lambda name: report.values(name, most).mean(),
        default=report.baseline,
    )
    against = [
        ("its own K = 0", adapted, 0),
        ("inner rate 0, same K", unadapted, most),
        (report.baseline, report.baseline, most),
    ]
    if best != report.baseline:
        against.append((f"{best}, the best other row", best, most))
    lines = []
    for called, other, shots in against:
        gain, (low, high) = report.difference(adapted, most, other, shots)
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        lines.append(f"{adapted} at K = {most} against {called}: {gain:+.4f} AUC [{low:+.4f} {high:+.4f}], {verdict}")
    hurt = report.values(adapted, most) < report.values(adapted, 0)
    lines.append(f"adapting to {most} ratings lowered the AUC of {hurt.mean():.0%} of users")
    return [*lines, *_pooled(report, adapted, most), *_left_out(report)]


def _pooled(report: Report, method: str, shots: int) -> list[str]:
    """Says what a pooled AUC is worth beside the row that only tells generous users from others."""
    if POOLED not in report.metrics:
        return []
    value, (low, high) = report.of_table(method, shots, POOLED)
    share, (share_low, share_high) = report.of_table(OwnLikeShare.name, shots, POOLED)
    return [
        f"pooled AUC at K = {shots}: {method} {value:.4f} [{low:.4f} {high:.4f}]; a score that is nothing but each "
        f"user's own share of likes, which orders no user's items, {share:.4f} [{share_low:.4f} {share_high:.4f}]"
    ]


def _left_out(report: Report) -> list[str]:
    return [f"{count} users left out: {reason}" for reason, count in report.left_out.items()]
