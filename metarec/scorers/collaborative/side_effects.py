"""What side information adds to a rating: features of the user and of the moment, times features of the item.

    effect(z, i) = z' P x_i

where z are features of who rates, and when, and x_i those of the item: 1, its fields and text, and factors of ratings.
P is learned by ridge regression of what item means and user biases leave of ratings; every block of z has a scale of
its own, chosen on users held out, and is left out where it does not help them. A text about a user may be read by two
towers too, see `metarec.scorers.collaborative.two_towers`.

Source: Rendle 2012, "Factorization machines with libFM", section 3: side features times item features; here linear in
both, so that a new user's effects need no gradient steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from metarec.data.interactions import Codes, Interactions, Ratings, Values
from metarec.data.side import Side, Texts
from metarec.scorers.collaborative.features import Features, principal_components
from metarec.scorers.collaborative.item_mean import fit_item_mean
from metarec.scorers.collaborative.residuals import Floats, Residuals, training_residuals
from metarec.scorers.collaborative.review_head import ReviewHead, with_reviews
from metarec.scorers.collaborative.side_readers import Friends, Reader, friends_of, reader_of, side_kind
from metarec.scorers.collaborative.stack import fold_order
from metarec.scorers.collaborative.two_towers import TowerData, Towers, TowerText, fit_towers
from metarec.system.progress import progress
from metarec.system.threads import one_thread

_LOG = logging.getLogger(__name__)
_FACTORS = 16
_COMPONENTS = 16
_TEXT_COMPONENTS = 64
# Scales of a block of side information that are tried, beside leaving it out.
_SCALES = (0.01, 0.03, 0.1, 0.3, 1.0)
_DAMP = 10.0
_ITERATIONS = 40
_BIAS_DAMPING = 3.0
_TASTE_DAMPING = 5.0
# Standard errors by which a block has to lower the error of held-out users.
_STANDARD_ERRORS = 2.0
_ROWS_AT_ONCE = 500_000
FRIENDS = "friends"


@dataclass(frozen=True)
class SideEffects:
    """What side information adds to each rating, in standard deviations of the rating.

    Args:
        about: Field of users to what reads it.
        moments: Field of moments to what reads it.
        friends: What reads friends; None where there are none, or they say nothing.
        items: Features of items, the first one 1, shape (items, width).
        effects: Block of side information to P's rows of it, shape (width of block, width).
        worth: Block to how far it lowers held-out users' squared error, with its standard error.
        unread: Fields of users that the data have and that are not read; ``friends`` where these are not.
        unread_moments: The same of moments.
        reviews: What reads the text that came with a rating; None where nothing does.
    """

    about: Mapping[str, Reader]
    moments: Mapping[str, Reader]
    friends: Friends | None
    items: Floats
    effects: Mapping[str, Floats]
    worth: Mapping[str, tuple[float, float]]
    unread: tuple[str, ...] = ()
    unread_moments: tuple[str, ...] = ()
    reviews: ReviewHead | None = None

    def asked(self, side: Side | None, items: Codes) -> Values:
        """Returns the effects on items that a user is asked about, shape (items,)."""
        return self._values(side, {} if side is None else side.asked, items)

    def rated(self, support: Ratings) -> Values:
        """Returns the effects on a user's ratings, shape (ratings,)."""
        return self._values(support.side, {} if support.side is None else support.side.rated, support.items)

    def _values(self, side: Side | None, moments: Mapping[str, Texts], items: Codes) -> Values:
        if side is None or not self.effects:
            return np.zeros(len(items), np.float32)
        weights = np.zeros((1, self.items.shape[1]))
        for name, reader in self.about.items():
            weights = weights + reader.read(np.array([side.about.get(name, "")], object)) @ self.effects[name]
        if self.friends is not None:
            weights = weights + self.friends.read([side]) @ self.effects[FRIENDS]
        for name, reader in self.moments.items():
            if name in moments:
                weights = weights + reader.read(moments[name]) @ self.effects[name]
        return np.asarray((weights * self.items[items]).sum(1), np.float32)

    def of_rows(self, interactions: Interactions, rows: Codes) -> Values:
        """Returns the effects on some rows of a dataset, shape (rows,)."""
        side, width = interactions.side, self.items.shape[1]
        users, place = np.unique(interactions.user[rows], return_inverse=True)
        weights = np.zeros((len(users), width))
        for name, reader in self.about.items():
            weights += reader.read(side.about[name][users]) @ self.effects[name]
        if self.friends is not None:
            weights += self.friends.read([Side(friends=side.friends[user]) for user in users]) @ self.effects[FRIENDS]
        found = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            own = weights[place[some]]
            for name, reader in self.moments.items():
                own = own + reader.read(side.moments[name][rows[some]]) @ self.effects[name]
            found[some] = (own * self.items[interactions.item[rows[some]]]).sum(1)
        return found

    def without(self, support: Ratings, scale: float) -> Ratings:
        """Returns a support of readings that lack the effects; `scale` is a rating's standard deviation."""
        if support.side is None:
            return support
        read = self.reviews.readings(support.values, support.side.reviews) if self.reviews else support.values
        return replace(support, values=(read - scale * self.rated(support)).astype(np.float32))

    def extended(self, items: int) -> SideEffects:
        """Returns the effects for a catalog of so many items, the new ones last: on these there are none."""
        return replace(self, items=np.pad(self.items, ((0, items - len(self.items)), (0, 0))))


@dataclass(frozen=True)
class FittedSide:
    """What `fit_side` fits.

    Args:
        whole: The effects, for new users.
        folds: Fitted without each fold of the meta-training users.
        fold: The fold of each meta-training user, by user id.
        interactions: The data whose ratings lack the effects; a meta-training user's by the fit without them.
    """

    whole: SideEffects
    folds: tuple[SideEffects, ...]
    fold: Mapping[str, int]
    interactions: Interactions


@dataclass(frozen=True)
class _Blocks:
    """Features of side information of some rows.

    Args:
        about: Field of users to what reads it.
        moments: Column of moments to what reads it.
        friends: What reads friends.
        features: Block to its features, by user or by row.
        of_rows: The blocks that are by row.
        texts: The fields of users that are texts.
        unread: Sentences about fields and columns that hold nothing to read.
    """

    about: Mapping[str, Reader]
    moments: Mapping[str, Reader]
    friends: Friends | None
    features: Mapping[str, Floats]
    of_rows: frozenset[str]
    texts: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Known:
    """What is known of the items, and which ratings are likes.

    Args:
        content: Principal components of all that is known of items, shape (items, width).
        text: More of those of their texts, for towers, of mean squared length one, shape (items, width).
        liked: Shape (rows,).
    """

    content: Floats
    text: Floats
    liked: np.ndarray


def _known(features: Features, liked: np.ndarray, towers: bool = True) -> _Known:
    text = features.text if towers else features.text[:, :0]
    text = principal_components(text, _TEXT_COMPONENTS) if text.shape[1] else text
    text = text / np.sqrt(max(float((text**2).sum(1).mean()), 1e-12))
    return _Known(principal_components(features.linear, _COMPONENTS), text, liked)


def no_effects(items: int) -> SideEffects:
    """Returns the effects of no side information on so many items: all 0."""
    return SideEffects({}, {}, None, np.ones((items, 1)), {}, {})


def fit_effects(
    interactions: Interactions,
    users: Codes,
    features: Features,
    *,
    threshold: float,
    seed: int,
    text_reader: Callable[[str, Texts], Reader | str] = reader_of,
) -> SideEffects:
    """Fits the effects of side information on all of some users alone, reviews unread; see `fit_side`."""
    known = _known(features, interactions.likes(threshold))
    return _fit(interactions, users, known, seed, text_reader)[0]


def fit_side(
    interactions: Interactions,
    users: Codes,
    features: Features,
    *,
    threshold: float,
    folds: int,
    seed: int,
    text_reader: Callable[[str, Texts], Reader | str] = reader_of,
    towers: bool = True,
) -> FittedSide:
    """Fits the effects of side information on all meta-training users and without each fold of them.

    Args:
        interactions: The dataset, with side information.
        users: The meta-training users; only their ratings are used.
        features: Features of all items.
        threshold: Ratings from here on are likes, see `Ratings.likes`.
        folds: Number of folds.
        seed: Seed of the folds.
        text_reader: Returns what reads a field, given its name and values.
        towers: Whether towers may read texts about users beside the regression.
    """
    order = fold_order(len(users), folds, seed)
    liked = interactions.likes(threshold)
    reviews, interactions = with_reviews(interactions, users, seed)
    known = _known(features, liked, towers)
    with progress("fitting the effects of side information", folds + 1, after=2.0) as advance:
        whole = _fit(interactions, users, known, seed, text_reader)
        advance(1)
        kept = whole[1]
        parts = []
        for fold in range(folds):
            parts.append(_fit(interactions, users[order != fold], known, seed, text_reader, kept)[0])
            advance(fold + 2)
    fold_of = {interactions.users[code]: int(fold) for code, fold in zip(users, order, strict=True)}
    scale = fit_item_mean(interactions, users).scale
    part_of = np.full(len(interactions.users), -1, np.int64)
    part_of[users] = order
    rating = interactions.rating.copy()
    for number, part in [(-1, whole[0]), *enumerate(parts)]:
        rows = np.flatnonzero(part_of[interactions.user] == number)
        rating[rows] -= scale * part.of_rows(interactions, rows)
    bare = replace(interactions, rating=rating, liked=liked)
    folded = tuple(replace(part, reviews=reviews) for part in parts)
    return FittedSide(replace(whole[0], reviews=reviews), folded, fold_of, bare)


@dataclass(frozen=True)
class _Chosen:
    """Which blocks are read, and how.

    Args:
        scales: Scales of the blocks that are read by ridge regression.
        towers: Fields whose texts are read by towers.
        replaced: Scales of those of them that ridge regression reads where towers find nothing.
    """

    scales: Mapping[str, float]
    towers: tuple[str, ...]
    replaced: Mapping[str, float]


@one_thread()
def _fit(
    interactions: Interactions,
    users: Codes,
    known: _Known,
    seed: int,
    text_reader: Callable[[str, Texts], Reader | str],
    kept: _Chosen | None = None,
) -> tuple[SideEffects, _Chosen]:
    """Returns the effects, and what was chosen; choices that are given are not made again."""
    own = np.isin(interactions.user, users)
    residuals = training_residuals(interactions, users, fit_item_mean(interactions, users)).centred(_BIAS_DAMPING)
    factors, tastes = _factors(residuals)
    items = _standardized(np.concatenate([known.content, factors], 1))
    side = interactions.side
    blocks = _blocks(interactions, users, own, tastes, text_reader)
    problem = _Problem(residuals, items, blocks)
    worth: dict[str, tuple[float, float]] = {}
    scales = {} if kept is None else {name: at for name, at in kept.scales.items() if name in blocks.features}
    if kept is None:
        for sentence in blocks.unread:
            _LOG.warning("%s", sentence)
        for name, (scale, gain) in problem.choose(seed).items():
            scales[name], worth[name] = scale, gain
    texts = {
        name: TowerData(blocks.features[name], known.text, residuals, known.liked[own])
        for name in blocks.texts
        if known.text.shape[1] and (kept is None or name in kept.towers)
    }
    replaced = {} if kept is None else dict(kept.replaced)
    if kept is None:
        by_ridge = scales
        scales, gains = problem.choose_towers(by_ridge, texts, seed)
        replaced = {name: scale for name, scale in by_ridge.items() if name not in scales}
        texts, worth = {name: texts[name] for name in gains}, {**worth, **gains}
    effects = problem.solve(scales, None)
    left, everybody = residuals.value - problem.predicted(effects), np.ones(len(users), bool)
    towers = {name: fit_towers(data, everybody, left, seed) for name, data in texts.items()}
    if lost := {name: scale for name, scale in replaced.items() if towers.get(name) is None}:
        effects = problem.solve({**scales, **lost}, None)
    found = SideEffects(
        about={name: reader for name, reader in blocks.about.items() if name in effects},
        moments={name: reader for name, reader in blocks.moments.items() if name in effects},
        friends=blocks.friends if FRIENDS in effects else None,
        items=items,
        effects=effects,
        worth=worth,
    )
    for name, fitted in towers.items():
        if fitted is not None:
            found = _with_towers(found, name, blocks.about[name], fitted)
    known_of_users = (*side.about, *([FRIENDS] if side.friends else []))
    found = replace(
        found,
        unread=tuple(name for name in known_of_users if name not in found.effects),
        unread_moments=tuple(name for name in side.moments if name not in found.effects),
    )
    return found, _Chosen(scales, tuple(texts), replaced)


def _with_towers(found: SideEffects, name: str, reader: Reader, towers: Towers) -> SideEffects:
    """Returns effects to which a product of towers is added: more numbers of the text, times more of each item."""
    width, own = found.items.shape[1], towers.items.shape[1]
    wider = {other: np.pad(effect, ((0, 0), (0, own))) for other, effect in found.effects.items()}
    by_ridge = wider.get(name, np.zeros((len(towers.users), width + own)))
    by_towers = np.concatenate([np.zeros((own, width)), np.eye(own)], 1)
    return replace(
        found,
        about={**found.about, name: TowerText(reader, towers.users, towers.mean)},
        items=np.concatenate([found.items, towers.items], 1),
        effects={**wider, name: np.concatenate([by_ridge, by_towers])},
    )


def _factors(residuals: Residuals) -> tuple[Floats, Floats]:
    """Returns factors of items, shape (items, factors), and tastes of users along them, shape (users, factors)."""
    from scipy.sparse.linalg import svds

    matrix = residuals.matrix().tocsc()
    width = min(_FACTORS, min(matrix.shape) - 1)
    if width < 1:
        return np.zeros((matrix.shape[1], 0)), np.zeros((matrix.shape[0], 0))
    _, _, items = svds(matrix, k=width, v0=np.ones(min(matrix.shape)))
    count = np.bincount(residuals.user, minlength=matrix.shape[0])
    factors: Floats = items.T * np.sqrt(matrix.shape[1])
    tastes: Floats = np.asarray(matrix @ factors) / (count + _TASTE_DAMPING)[:, None]
    return factors, tastes


def _standardized(features: Floats) -> Floats:
    """Returns features of mean square one behind a constant."""
    spread = np.sqrt(np.maximum((features**2).mean(0), 1e-12))
    return np.concatenate([np.ones((len(features), 1)), features / spread], 1)


def _blocks(
    interactions: Interactions,
    users: Codes,
    own: np.ndarray,
    tastes: Floats,
    text_reader: Callable[[str, Texts], Reader | str],
) -> _Blocks:
    side, ordered = interactions.side, np.sort(users)
    about, moments, features, unread = {}, {}, {}, []
    for name, column in side.about.items():
        reader = text_reader(name, column[ordered])
        if isinstance(reader, str):
            unread.append(f"users' field '{name}' is not read: {reader}")
        else:
            about[name], features[name] = reader, reader.read(column[ordered])
    for name, column in side.moments.items():
        reader = text_reader(name, column[own])
        if isinstance(reader, str):
            unread.append(f"the moments' column '{name}' is not read: {reader}")
        else:
            moments[name], features[name] = reader, reader.read(column[own])
    friends = None
    if any(side.friends):
        friends = friends_of([interactions.users[code] for code in ordered], tastes)
        features[FRIENDS] = friends.read([Side(friends=side.friends[code]) for code in ordered])
    texts = tuple(
        name for name in about if side_kind(name, [text for text in side.about[name][ordered] if text]) == "text"
    )
    return _Blocks(about, moments, friends, features, frozenset(moments), texts, tuple(unread))


@dataclass(frozen=True)
class _Grouped:
    """Features of a block, once for each user or each different moment.

    Args:
        features: Shape (groups, width).
        group: The group of each rating, shape (ratings,).
    """

    features: Floats
    group: Codes


class _Problem:
    """Ridge regression of residuals on products of side information's and items' features."""

    def __init__(self, residuals: Residuals, items: Floats, blocks: _Blocks) -> None:
        self._residuals, self._items = residuals, items
        self._blocks: dict[str, _Grouped] = {}
        for name, block in blocks.features.items():
            if name in blocks.of_rows:
                different, place = np.unique(block, axis=0, return_inverse=True)
                self._blocks[name] = _Grouped(different, place.ravel())
            else:
                self._blocks[name] = _Grouped(block, residuals.user)

    def choose(self, seed: int) -> dict[str, tuple[float, tuple[float, float]]]:
        """Returns the scale of every block that lowers held-out users' error, with how far it does."""
        held_out = np.random.default_rng([seed, 3]).permutation(self._residuals.shape[0]) % 2
        chosen: dict[str, tuple[float, tuple[float, float]]] = {}
        best = self._errors({}, held_out)
        for name in self._blocks:
            scales = {other: scale for other, (scale, _) in chosen.items()}
            tried = {scale: self._errors({**scales, name: scale}, held_out) for scale in _SCALES}
            scale = min(tried, key=lambda one: float(tried[one].sum()))
            gain = best - tried[scale]
            mean, error = float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))
            significant = mean > _STANDARD_ERRORS * error and mean > 0
            _LOG.info("side information '%s' lowers the squared error by %.4f (%.4f)", name, mean, error)
            if significant:
                chosen[name], best = (scale, (mean, error)), tried[scale]
            else:
                _LOG.warning("side information '%s' does not help users held out: it is left out", name)
        return chosen

    def choose_towers(
        self, scales: Mapping[str, float], texts: Mapping[str, TowerData], seed: int
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Returns the scales that stay, and the fields whose texts towers read, with how far that lowers the error.

        Towers are read beside the ridge regression of a text, or in its place, whichever lowers held-out users' error
        more; if neither does, the regression alone.
        """
        held_out = np.random.default_rng([seed, 3]).permutation(self._residuals.shape[0]) % 2
        kept, gains = dict(scales), {}
        for name, data in texts.items():
            before = self._errors(kept, held_out)
            without = {other: scale for other, scale in kept.items() if other != name}
            tried = [(some, self._errors_with_towers(some, data, held_out, seed)) for some in (kept, without)]
            best, errors = min(tried, key=lambda one: float(one[1].sum()))
            gain = before - errors
            mean, error = float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))
            _LOG.info("two towers that read '%s' lower the squared error by %.4f (%.4f)", name, mean, error)
            if mean > _STANDARD_ERRORS * error and mean > 0:
                kept, gains[name] = dict(best), (mean, error)
        return kept, gains

    def _errors_with_towers(self, scales: Mapping[str, float], data: TowerData, held_out: Codes, seed: int) -> Floats:
        """Returns what `_errors` does, under towers too that were trained on the other half."""
        user, value = self._residuals.user, self._residuals.value
        squares = np.zeros(self._residuals.shape[0])
        for half in (0, 1):
            rows = held_out[user] == half
            left = value - self.predicted(self.solve(scales, ~rows) if scales else {})
            towers = fit_towers(data, held_out != half, left, seed)
            if towers is not None:
                users, items = towers.of(data.features)[user[rows]], towers.items[self._residuals.item[rows]]
                left[rows] -= (users * items).sum(1)
            squares += np.bincount(user[rows], left[rows] ** 2, len(squares))
        return squares / np.maximum(np.bincount(user, minlength=len(squares)), 1)

    def _errors(self, scales: Mapping[str, float], held_out: Codes) -> Floats:
        """Returns each user's mean squared error under effects learned from the other half, shape (users,)."""
        user, value = self._residuals.user, self._residuals.value
        squares = np.zeros(self._residuals.shape[0])
        for half in (0, 1):
            rows = held_out[user] == half
            effects = self.solve(scales, ~rows) if scales else {}
            left = value[rows] - self.predicted(effects)[rows]
            squares += np.bincount(user[rows], left**2, len(squares))
        return squares / np.maximum(np.bincount(user, minlength=len(squares)), 1)

    def predicted(self, effects: Mapping[str, Floats]) -> Floats:
        """Returns what effects add to each rating, shape (ratings,)."""
        items = self._items[self._residuals.item]
        found = np.zeros(len(items))
        for name, effect in effects.items():
            block = self._blocks[name]
            found += ((block.features @ effect)[block.group] * items).sum(1)
        return found

    def solve(self, scales: Mapping[str, float], rows: np.ndarray | None) -> dict[str, Floats]:
        """Returns the effects of blocks with given scales, from some rows."""
        from scipy.sparse import csr_array
        from scipy.sparse.linalg import LinearOperator, lsmr

        if not scales:
            return {}
        chosen = np.ones(len(self._residuals.value), bool) if rows is None else rows
        value, known = self._residuals.value[chosen], self._items[self._residuals.item[chosen]]
        ratings, width = known.shape
        features = [self._blocks[name].features * scale for name, scale in scales.items()]
        groups = [self._blocks[name].group[chosen] for name in scales]
        # Each sums what is known of ratings over the ratings of a group.
        sums = [
            csr_array((np.ones(ratings), (group, np.arange(ratings))), (len(block), ratings))
            for group, block in zip(groups, features, strict=True)
        ]
        bounds = np.cumsum([0, *(block.shape[1] for block in features)]).tolist()

        def forward(flat: Floats) -> Floats:
            parts = np.split(flat.reshape(-1, width), bounds[1:-1])
            weights = sum((block @ part)[group] for block, part, group in zip(features, parts, groups, strict=True))
            return np.asarray((weights * known).sum(1))

        def back(errors: Floats) -> Floats:
            moved = known * errors.ravel()[:, None]
            return np.concatenate(
                [(block.T @ (total @ moved)).ravel() for block, total in zip(features, sums, strict=True)]
            )

        shape = (ratings, bounds[-1] * width)
        operator = LinearOperator(shape, matvec=forward, rmatvec=back, dtype=np.float64)
        flat = lsmr(operator, value, damp=np.sqrt(_DAMP), maxiter=_ITERATIONS)[0].reshape(-1, width)
        return {
            name: part * scale for (name, scale), part in zip(scales.items(), np.split(flat, bounds[1:-1]), strict=True)
        }
