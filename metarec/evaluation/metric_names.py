"""Names of metrics: what there is, what each is measured of, and what it needs. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from metarec.errors import EvaluationError, suggest

# Measures with a cutoff, and what ir_measures calls them.
RANKING = {"ndcg": "nDCG", "precision": "P", "recall": "R", "hit": "Success", "mrr": "RR"}
# Of a whole table, not of one user: the AUC of all users' items together, means of users' AUCs, and the F1 of likes.
POOLED = "pooled_auc"
OF_A_TABLE = (POOLED, "uauc", "uauc_weighted", "f1")
CUTOFF = 10
METRICS = ("auc", f"ndcg@{CUTOFF}")
RECBOLE = ("recbole-rating-ndcg", "recbole-click-ndcg")
ERRORS = ("mae", "rmse")
# Of a user, from probabilities of a like.
OF_CHANCES = ("log_loss", "accuracy")
# Need validation users, on whom scores become ratings and probabilities.
CALIBRATED = (*ERRORS, *OF_CHANCES, "f1")
# Of what is recommended out of the whole catalog, see `metarec.evaluation.recommended_lists`.
LIST_OF_A_USER = ("diversity", "novelty", "popularity")
OF_ALL_LISTS = ("coverage", "gini")
LISTS = (*OF_ALL_LISTS, *LIST_OF_A_USER)
# The AUC of groups of users; what follows names a grouping or a field of users, see `metarec.data.user_groups`.
GROUPED = "auc_by_"
# All there is beyond a ranking's accuracy.
BEYOND = (*(f"{measure}@{CUTOFF}" for measure in LISTS), *OF_CHANCES, "f1", f"{GROUPED}activity")


def needs_calibration(metrics: Sequence[str]) -> bool:
    """Says whether some metric needs scores as ratings or as probabilities."""
    return bool(set(metrics) & set(CALIBRATED))


def asks_lists(metrics: Sequence[str]) -> list[str]:
    """Returns the metrics of what is recommended out of the whole catalog."""
    return [metric for metric in metrics if metric.partition("@")[0] in LISTS]


def of_the_query(metrics: Sequence[str]) -> list[str]:
    """Returns the metrics that each user has from the query alone."""
    lists = asks_lists(metrics)
    return [name for name in metrics if name not in (*OF_A_TABLE, *lists) and not name.startswith(GROUPED)]


def has_interval(metric: str) -> bool:
    """Says whether a table shows a metric with its own interval, see `metarec.evaluation.report.Report.of_table`."""
    return metric in OF_CHANCES or metric not in of_the_query([metric])


def check_metric(name: str) -> None:
    """Refuses a metric that there is not.

    Raises:
        EvaluationError: It is none of ``auc``, `CALIBRATED`, `OF_A_TABLE`, `GROUPED` with what users are grouped by, or
            a measure with a cutoff.
    """
    measure, at, cutoff = name.partition("@")
    ranking = measure in (*RANKING, *RECBOLE, *LISTS) and at and cutoff.isdigit() and int(cutoff) > 0
    grouped = name.startswith(GROUPED) and name != GROUPED
    if not ranking and not grouped and name not in ("auc", *OF_A_TABLE, *CALIBRATED):
        measures = (*RANKING, *RECBOLE, *LISTS)
        known = ["auc", *OF_A_TABLE, *CALIBRATED, f"{GROUPED}activity", *(f"{measure}@5" for measure in measures)]
        raise EvaluationError(f"no metric is called '{name}'", suggest(name, known))


def check_metrics(names: Sequence[str]) -> None:
    """Refuses metrics of which there is not one; see `check_metric`."""
    for name in names:
        check_metric(name)
