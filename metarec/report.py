"""What an evaluation found, for people: a terminal table and plain sentences.

Knows nothing of how the numbers were made.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from metarec.evaluate import CUTOFF, METRICS, Cell, Report


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


def _lines(cell: Cell, baseline: str) -> Sequence[str]:
    low, high = cell.interval
    paired = ("", "") if cell.method == baseline else (f"{cell.gain:+.4f}", f"{low:+.4f} {high:+.4f}")
    return (
        f"{cell.means['auc']:.4f}",
        *(f"{value:.4f}" for metric, value in cell.means.items() if metric != "auc"),
        *paired,
        f"{cell.seconds_per_user:.4f}",
        f"{cell.bytes_per_user:,}",
    )


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
