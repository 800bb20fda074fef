"""Ranking metrics of one user and of a table of users, by well-kept libraries, with honest ties.

AUC counts a tie as one half; nDCG breaks ties by a seeded hash of the item, so that a constant score gets what chance
gets and no method gains from the order of its input. A score that is not a finite number is an error, never a rank.
The libraries are imported where they are called: a task names metrics, and reading a task computes none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from metarec.errors import EvaluationError
from metarec.evaluation.metric_names import POOLED, RANKING

# The row that gains are measured from, in every table.
BASELINE = "item mean"


def check_scores(scores: NDArray[np.floating], where: str) -> None:
    """Refuses scores that cannot be ranked.

    Raises:
        EvaluationError: A score is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise EvaluationError(f"{where}: score {scores[bad[0]]} of candidate {bad[0]} is not a finite number")


def auc(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve of one user: the chance that a liked item scores above a disliked one.

    Args:
        scores: Finite scores, shape (candidates,).
        labels: True where the user liked the item, shape (candidates,).

    Returns:
        The area, or None where all labels are the same.

    Source: Mann and Whitney 1947, "On a test of whether one of two random variables is stochastically larger than the
    other": the area is their statistic by the number of pairs; ties count a half.
    """
    liked = int(labels.sum())
    pairs = liked * (len(labels) - liked)
    if pairs == 0:
        return None
    from scipy.stats import rankdata

    return float((rankdata(scores)[labels].sum() - liked * (liked + 1) / 2) / pairs)


def ndcg(
    scores: NDArray[np.floating], labels: NDArray[np.bool_], items: Sequence[str], cutoff: int, seed: int
) -> float | None:
    """Normalized discounted cumulative gain of one user (Jarvelin and Kekalainen 2002); see `at_cutoff`."""
    return at_cutoff("ndcg", scores, labels, items, cutoff, seed)


def at_cutoff(
    measure: str,
    scores: NDArray[np.floating],
    labels: NDArray[np.bool_],
    items: Sequence[str],
    cutoff: int,
    seed: int,
) -> float | None:
    """A ranking measure of one user over the first ranks, binary gains.

    Args:
        measure: A key of `metarec.evaluation.metric_names.RANKING`.
        scores: Finite scores, shape (candidates,).
        labels: True where the user liked the item, shape (candidates,).
        items: Item ids, for breaking ties.
        cutoff: Ranks that count.
        seed: Another seed breaks ties in another order.

    Returns:
        The value, or None where all labels are the same.
    """
    if labels.all() or not labels.any():
        return None
    import ir_measures

    ranks = np.empty(len(scores), np.int64)
    ranks[rank_order(scores, items, seed)] = np.arange(len(scores), 0, -1)
    # Ranks, not scores, go to the library: it would break ties by document name.
    qrels = {"user": {str(code): int(label) for code, label in enumerate(labels)}}
    run = {"user": {str(code): float(rank) for code, rank in enumerate(ranks)}}
    wanted = getattr(ir_measures, RANKING[measure]) @ cutoff
    return float(ir_measures.calc_aggregate([wanted], qrels, run)[wanted])


def recbole_ndcg(scores: NDArray[np.floating], relevance: NDArray[np.floating], cutoff: int, *, clicks: bool) -> float:
    """Gain as RecBole-MetaRec's evaluator computes it, ties included: for comparison with its tables, not a measure.

    Both sides are cut by ``torch.topk``, which takes whichever of tied values it meets; a model that scores all
    items alike therefore shares its choice with the labels and gets more than chance.

    Args:
        scores: Scores, shape (candidates,); NaN is ranked like any other value, as there.
        relevance: Ratings, of which the `cutoff` highest count as relevant; or zeros and ones, of which the ones do.
        cutoff: Ranks that count.
        clicks: Whether `relevance` is zeros and ones.

    Returns:
        The gain; zero where nothing is relevant.

    Source: nuster1128/RecBole-MetaRec, its evaluation rules as published (written anew).
    """
    import torch

    count = min(cutoff, len(scores))
    wanted = int(relevance.sum()) if clicks else count
    relevant = torch.topk(torch.from_numpy(relevance.astype(np.float32)), wanted)[1]
    ranked = torch.topk(torch.from_numpy(np.array(scores, np.float32)), count)[1]
    if len(relevant) == 0:
        return 0.0
    discount = 1 / np.log2(np.arange(2, count + 2))
    ideal = discount[: len(relevant)].sum()
    return float(discount[torch.isin(ranked, relevant).numpy()].sum() / ideal)


def rank_order(scores: NDArray[np.floating], items: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Returns positions from best to worst, ties in the order of a seeded hash of the item id."""
    ties = [hashlib.blake2b(f"{seed}\0{item}".encode(), digest_size=8).hexdigest() for item in items]
    return np.lexsort((np.array(ties), -np.asarray(scores, np.float64)))


def leaders(scores: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Returns the positions of the `k` best scores, and of all that equal the last of these, ascending.

    Of a million scores they are found in a tenth of the time that an order of all takes.
    """
    falling = -np.asarray(scores, np.float64)
    if k >= len(falling):
        return np.arange(len(falling))
    return np.flatnonzero(~(falling > np.partition(falling, k - 1)[k - 1]))


def bootstrap_interval(
    values: NDArray[np.floating], seed: int, clusters: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean (Efron 1979); over paired differences, a paired bootstrap.

    Args:
        values: One number per user.
        seed: Seed of the 9,999 resamples.
        clusters: Whom each number belongs to, where one person has several; whole people are drawn then (Davison and
            Hinkley 1997, section 3.8).

    Returns:
        The lower and the upper end; both are the mean itself where all values are the same.
    """
    if len(values) < 2 or np.ptp(values) == 0:
        mean = float(np.mean(values)) if len(values) else float("nan")
        return mean, mean
    import pandas as pd
    from scipy import stats

    grouped = pd.Series(values).groupby(list(range(len(values)) if clusters is None else clusters), sort=False)
    sums, counts = grouped.sum().to_numpy(), grouped.count().to_numpy()
    if len(sums) < 2:
        return float(np.mean(values)), float(np.mean(values))

    def mean_of(sums: NDArray[np.floating], counts: NDArray[np.integer], axis: int = -1) -> NDArray[np.floating]:
        means: NDArray[np.floating] = sums.sum(axis) / counts.sum(axis)
        return means

    result = stats.bootstrap(
        (sums, counts), mean_of, paired=True, vectorized=True, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


# So many differences have fewer flips of signs than `scipy.stats.permutation_test` counts at most.
_FEW_DIFFERENCES = 13


def paired_p_value(differences: NDArray[np.floating]) -> float:
    """Returns the two-sided p-value of paired differences by the signed-rank test; 1 where one differs or none.

    Of few differences with ties every flip of signs is counted, as `scipy.stats.wilcoxon` does, but all at once.

    Args:
        differences: One number per person.

    Source: Wilcoxon 1945, "Individual comparisons by ranking methods"; people without a difference are left out.
    """
    from scipy import stats

    moved = differences[differences != 0]
    if len(moved) < 2:
        return 1.0
    ranks = stats.rankdata(np.abs(moved))
    if len(moved) > _FEW_DIFFERENCES or (len(moved) == len(differences) and len(np.unique(ranks)) == len(ranks)):
        return float(stats.wilcoxon(differences).pvalue)

    def positive(values: NDArray[np.floating], axis: int = -1) -> NDArray[np.floating]:
        total: NDArray[np.floating] = (ranks * (values > 0)).sum(axis)
        return total

    flips = stats.permutation_test((moved,), positive, permutation_type="samples", vectorized=True)
    return float(flips.pvalue)


def calibration_error(chance: NDArray[np.floating], liked: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error over bins of equally many predictions (Nixon et al. 2019, adaptive binning).

    Args:
        chance: Predicted probabilities of a like, shape (predictions,).
        liked: What happened, shape (predictions,).
        bins: How many bins.
    """
    order = np.argsort(chance, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [abs(chance[part].mean() - liked[part].mean()) * len(part) for part in parts]
    return float(np.sum(gaps) / len(order))


def calibrated(
    scores: NDArray[np.floating], liked: NDArray[np.bool_], people: Sequence[Hashable], folds: int = 5
) -> NDArray[np.floating]:
    """Turns scores into probabilities of a like by logistic regression, every person's fitted on the others.

    Args:
        scores: Shape (predictions,).
        liked: What happened, shape (predictions,).
        people: Whose prediction each is; fewer people than folds make fewer folds.
        folds: How many folds of people.

    Returns:
        Shape (predictions,).

    Raises:
        EvaluationError: There is one person only, or all predictions of a fold's others are of one class.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", without its target smoothing.
    """
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    folds = min(folds, len(set(people)))
    if folds < 2:
        raise EvaluationError("one person's scores cannot be calibrated on others", "Evaluate more users")
    spread = np.std(scores) or 1.0
    model = LogisticRegression(C=1e3)
    chance: NDArray[np.floating] = cross_val_predict(
        model,
        ((scores - np.mean(scores)) / spread)[:, None],
        liked,
        groups=pd.factorize(pd.Series(list(people)))[0],
        cv=GroupKFold(folds),
        method="predict_proba",
    )[:, 1]
    return chance


_TABLE_RESAMPLES = 999


def table_metric(
    metric: str,
    scores: NDArray[np.floating],
    liked: NDArray[np.bool_],
    users: Sequence[Hashable],
) -> float | None:
    """A metric that is defined for all users together.

    ``pooled_auc`` compares items of different users too, so that a score which only tells generous users from others
    is worth something. ``uauc`` is the mean AUC of users with both classes, as in Zhang et al. 2023,
    "CoLLM", arXiv 2310.19488, ``uauc_weighted`` their mean weighted by the number of items, as Zhou et al. 2018, "Deep
    interest network", arXiv 1706.06978, weight it by impressions. ``f1`` is that of likes, of all items together.

    Args:
        metric: One of `metarec.evaluation.metric_names.OF_A_TABLE`.
        scores: Finite scores, shape (predictions,); of ``f1`` probabilities of a like.
        liked: What happened, shape (predictions,).
        users: Whose prediction each is.

    Returns:
        The value, or None where it is not defined: all labels of the table, or of every user, are the same.
    """
    if metric == POOLED:
        return auc(scores, liked)
    if metric == "f1":
        return float(_f1(np.ones((1, 1)), scores, liked, np.zeros(len(scores), np.int64))[0])
    values, sizes, _ = _auc_by_user(scores, liked, users, np.arange(len(scores)))
    weights = sizes if metric == "uauc_weighted" else np.ones(len(sizes))
    return float(np.average(values, weights=weights)) if len(values) else None


def _f1(
    drawn: NDArray[np.number], chance: NDArray[np.floating], liked: NDArray[np.bool_], person: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Returns the F1 of predicted likes for each row of counts of people; 0 where nothing is liked nor predicted."""
    said = chance >= 0.5
    counts = [np.bincount(person, flags, drawn.shape[1]) for flags in (said & liked, said, liked)]
    hits, predicted, true = (drawn @ count for count in counts)
    value: NDArray[np.float64] = 2 * hits / np.maximum(predicted + true, 1)
    return value


def _codes(names: Sequence[Hashable]) -> NDArray[np.int64]:
    """Returns a number for each name, the same for the same name, in the order of their first appearance."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], np.int64)


def _auc_by_user(
    scores: NDArray[np.floating], liked: NDArray[np.bool_], users: Sequence[Hashable], person: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the AUC, the number of items and the person of every user with both classes."""
    order = np.argsort(code := _codes(users), kind="stable")
    rows_of = np.split(order, np.flatnonzero(np.diff(code[order])) + 1)
    areas = ((auc(scores[rows], liked[rows]), len(rows), int(person[rows[0]])) for rows in rows_of if len(rows))
    found = [(area, size, one) for area, size, one in areas if area is not None]
    values, sizes, people = zip(*found, strict=True) if found else ((), (), ())
    return np.array(values, np.float64), np.array(sizes, np.int64), np.array(people, np.int64)


def table_interval(
    metric: str,
    scores: NDArray[np.floating],
    liked: NDArray[np.bool_],
    users: Sequence[Hashable],
    seed: int,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """95% percentile bootstrap interval of `table_metric`: whole users are drawn, with all of their items.

    Args:
        metric: One of `metarec.evaluation.metric_names.OF_A_TABLE`.
        scores: Finite scores, shape (predictions,).
        liked: What happened, shape (predictions,).
        users: Whose prediction each is.
        seed: Seed of the 999 resamples.
        clusters: The person of each prediction, where one person is several users; whole people are drawn then.

    Returns:
        The lower and the upper end; NaN where the metric is not defined.
    """
    person = _codes(users if clusters is None else clusters)
    people = int(person.max(initial=-1)) + 1
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / max(people, 1)), _TABLE_RESAMPLES)
    if metric == POOLED:
        values = _weighted_aucs(scores, liked, person, drawn)
    elif metric == "f1":
        values = _f1(drawn, scores, liked, person)
    else:
        areas, sizes, owners = _auc_by_user(scores, liked, users, person)
        weights = drawn[:, owners] * (sizes if metric == "uauc_weighted" else 1)
        total = weights.sum(1)
        values = np.divide(weights @ areas, total, out=np.full(len(drawn), np.nan), where=total > 0)
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


def _weighted_aucs(
    scores: NDArray[np.floating], liked: NDArray[np.bool_], person: NDArray[np.integer], drawn: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Returns the AUC of all predictions for each row of counts of people; NaN where one class is left."""
    level = np.unique(scores, return_inverse=True)[1]
    levels = int(level.max(initial=-1)) + 1
    areas = np.full(len(drawn), np.nan)
    for place, counts in enumerate(drawn):
        weight = counts[person]
        above = np.bincount(level, weight * liked, levels)
        below = np.bincount(level, weight * ~liked, levels)
        pairs = above.sum() * below.sum()
        if pairs:
            areas[place] = (above * (np.cumsum(below) - below / 2)).sum() / pairs
    return areas


def log_loss(chance: NDArray[np.floating], liked: NDArray[np.bool_]) -> float:
    """Returns the mean negative log-likelihood of what happened, in nats; no chance is nearer than 1e-6 to 0 or 1."""
    sure = np.clip(np.where(liked, chance, 1 - chance), 1e-6, 1 - 1e-6)
    return float(-np.log(sure).mean())
