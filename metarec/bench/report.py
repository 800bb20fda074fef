"""What an evaluation found, for people: a terminal table and plain sentences.

Knows nothing of how the numbers were made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from metarec.bench.summary import Summary
from metarec.evaluate import Report, ShotSummary
from metarec.metrics import CUTOFF, METRICS

_SIGNIFICANT = 0.05


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
    labels = ("AUC", f"nDCG@{CUTOFF}", *more, *paired)
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
        *(f"{value:.4f}" for metric, value in cell.means.items() if metric != "auc"),
        *paired,
        f"{cell.seconds_per_user:.4f}",
        f"{cell.bytes_per_user:,}",
    )


def standings(summary: Summary, reference: str | None = None) -> Table:
    """Returns a benchmark's table: a line per method, most gained at the largest K first, a column per K."""
    ranked = summary.ranked(reference)
    shots = sorted(next(iter(ranked.values())))
    size = "" if summary.train_users is None else f", {summary.train_users} meta-training users"
    result = Table(title=f"{summary.task}{size}: AUC, and the paired difference to the {summary.report.baseline}")
    result.add_column("method")
    for count in shots:
        result.add_column(f"K = {count}", justify="right", no_wrap=True)
    for column in ("hurt\nECE", "fit s\ns/user", "users\nB/user"):
        result.add_column(column, justify="right", no_wrap=True)
    for cells in ranked.values():
        last = cells[shots[-1]]
        versus = f"versus {summary.report.baseline}"
        texts = [
            f"{cells[count]['auc']:.4f} "
            + (f"\n{cells[count][versus]['difference']:+.4f}" if versus in last else "")
            + ("*" if versus in last and cells[count][versus]["p_holm"] < _SIGNIFICANT else " ")
            for count in shots
        ]
        costs = (
            f"{last['hurt']:.0%}\n{last['ece']:.3f}",
            f"{last['fit_seconds']:.1f}\n{last['seconds_per_user']:.4f}",
            f"{last['episodes']}\n{last['bytes_per_user']:,}",
        )
        result.add_row(last["method"], *texts, *costs)
    result.caption = "* differs after Holm's correction (signed ranks, 5%); hurt: users worse off than at K = 0"
    return result


def markdown(summary: Summary, reference: str | None = None) -> str:
    """Returns a benchmark's table in Markdown, most gained at the largest K first.

    Args:
        summary: The cells of one task.
        reference: The method whose name is set in bold.

    Returns:
        One line per method: AUC by K with the paired difference to the baseline and its 95% interval, the share of
        users worse off than without ratings, calibration error, and costs at the largest K.
    """
    ranked = summary.ranked(reference)
    shots = sorted(next(iter(ranked.values())))
    versus = f"versus {summary.report.baseline}"
    lines = [
        f"| AUC (difference to {summary.report.baseline}) | "
        + " | ".join(f"K = {count}" for count in shots)
        + " | users | hurt | ECE | fit s | s/user | B/user |",
        "|---" * (len(shots) + 7) + "|",
    ]
    for cells in ranked.values():
        last = cells[shots[-1]]
        texts = [_markdown_cell(cells[count], versus) for count in shots]
        name = f"**{last['method']}**" if last["method"] == reference else last["method"]
        costs = (
            f"{last['episodes']} | {last['hurt']:.0%} | {_short(last['ece'], '.3f')} | {last['fit_seconds']:.0f}"
            f" | {last['seconds_per_user']:.3f} | {last['bytes_per_user']:,}"
        )
        lines.append(f"| {name} | " + " | ".join(texts) + f" | {costs} |")
    return "\n".join(lines)


def _markdown_cell(row: Mapping[str, Any], versus: str) -> str:
    text = _short(row["auc"], ".4f")
    if versus in row:
        one = row[versus]
        star = "*" if one["p_holm"] < _SIGNIFICANT else ""
        text += (
            f" {_short(one['difference'], '+.4f')}{star} [{_short(one['low'], '+.4f')} {_short(one['high'], '+.4f')}]"
        )
    return text


def _short(value: float, form: str) -> str:
    """Formats a number without the zero before the point."""
    return re.sub(r"0(?=[.])", "", format(value, form))


def findings(report: Report, adapted: str, unadapted: str) -> list[str]:
    """Says in sentences what adapting did, whichever way it went."""
    most = int(report.costs["shots"].max())
    others = dict.fromkeys(report.costs["method"])
    best = max(
        (name for name in others if name not in (adapted, unadapted)), key=lambda name: report.values(name, most).mean()
    )
    against = [
        ("its own K = 0", adapted, 0),
        ("inner rate 0, same K", unadapted, most),
        (report.baseline, report.baseline, most),
    ]
    if best != report.baseline:
        against.append((f"{best}, the best other row", best, most))
    lines = []
    for label, other, shots in against:
        gain, (low, high) = report.difference(adapted, most, other, shots)
        verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart"
        lines.append(f"{adapted} at K = {most} against {label}: {gain:+.4f} AUC [{low:+.4f} {high:+.4f}], {verdict}")
    hurt = report.values(adapted, most) < report.values(adapted, 0)
    lines.append(f"adapting to {most} ratings lowered the AUC of {hurt.mean():.0%} of users")
    lines += [f"{count} users left out: {reason}" for reason, count in report.left_out.items()]
    return lines
