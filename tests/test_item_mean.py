"""The item prior shrinks, never sees who it must not see, and reads text where nobody rated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import known_interactions

from metarec.data.interactions import Interactions, Ratings
from metarec.errors import DataError
from metarec.scorers.collaborative.item_mean import fit_item_mean, smooth_by_text

DATA = known_interactions()
TRAIN = np.arange(40)
ITEMS = np.arange(len(DATA.catalog))


def test_the_prior_ignores_everybody_outside_meta_training() -> None:
    other = np.where(np.isin(DATA.user, TRAIN), DATA.rating, 0.5).astype(np.float32)
    assert np.array_equal(
        fit_item_mean(DATA, TRAIN).values(ITEMS), fit_item_mean(replace(DATA, rating=other), TRAIN).values(ITEMS)
    )


def test_leaving_ones_own_rating_out_is_fitting_without_it() -> None:
    prior = fit_item_mean(DATA, TRAIN)
    own = DATA.ratings(DATA.rows_of_user[3])
    without = replace(
        prior,
        total=prior.total - np.bincount(own.items, prior.standardize(own.values), len(ITEMS)).astype(np.float32),
        count=prior.count - np.bincount(own.items, minlength=len(ITEMS)).astype(np.float32),
    )
    np.testing.assert_allclose(prior.values_without(own), without.values(own.items), rtol=1e-5, atol=1e-6)


def test_a_users_own_rating_cannot_be_read_off_its_prior() -> None:
    prior = fit_item_mean(DATA, TRAIN)
    own = DATA.ratings(DATA.rows_of_user[3])
    flipped = Ratings(own.items, (5.5 - own.values).astype(np.float32))
    changed = DATA.rating.copy()
    changed[DATA.rows_of_user[3]] = flipped.values
    refitted = replace(fit_item_mean(replace(DATA, rating=changed), TRAIN), mean=prior.mean, scale=prior.scale)
    raw = replace(DATA, rating=changed)
    total = np.bincount(
        raw.item[np.isin(raw.user, TRAIN)], prior.standardize(raw.rating[np.isin(raw.user, TRAIN)]), len(ITEMS)
    )
    refitted = replace(refitted, total=total.astype(np.float32), strength=prior.strength)
    np.testing.assert_allclose(prior.values_without(own), refitted.values_without(flipped), rtol=1e-4, atol=1e-5)


def tilted(noise: float) -> tuple[Interactions, np.ndarray]:
    """Items whose quality is a linear function of a two-number text; the last ten are never rated."""
    generator = np.random.default_rng(0)
    text = generator.normal(size=(300, 2))
    user = np.repeat(np.arange(60), 40)
    item = np.concatenate([generator.choice(290, 40, replace=False) for _ in range(60)])
    rating = 3 + 0.8 * text[item] @ [1.0, -0.5] + noise * generator.normal(size=len(item))
    base = known_interactions()
    catalog = replace(base.catalog, ids=tuple(map(str, range(300))), fields={"title": tuple(map(str, range(300)))})
    data = replace(base, user=user, item=item, rating=rating.astype(np.float32), catalog=catalog)
    return data, text


def test_text_predicts_items_that_nobody_rated() -> None:
    data, text = tilted(noise=0.5)
    mean = fit_item_mean(data, TRAIN)
    smooth = smooth_by_text(mean, text, seed=0)
    truth = text @ [1.0, -0.5]
    unrated = np.arange(290, 300)
    assert np.ptp(mean.values(unrated)) == 0, "without text they are all the same"
    assert np.corrcoef(smooth.values(unrated), truth[unrated])[0, 1] > 0.9
    assert np.array_equal(smooth.without_text().values(unrated), mean.values(unrated))


def test_an_items_own_ratings_do_not_enter_its_text_prediction() -> None:
    data, _ = tilted(noise=0.5)
    noise = np.random.default_rng(1).normal(size=(300, 200))
    mean = fit_item_mean(data, TRAIN)
    rated = np.flatnonzero(mean.count > 0)
    observed = mean.total[rated] / mean.count[rated]
    # 200 meaningless features would fit 290 items almost perfectly in sample.
    assert abs(np.corrcoef(smooth_by_text(mean, noise, 0).centre[rated], observed)[0, 1]) < 0.2


def test_more_noise_means_more_shrinkage() -> None:
    assert fit_item_mean(tilted(2.0)[0], TRAIN).strength > 4 * fit_item_mean(tilted(0.5)[0], TRAIN).strength


def test_ratings_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(DataError, match="all the same"):
        fit_item_mean(replace(DATA, rating=np.full_like(DATA.rating, 4.0)), TRAIN)


def test_a_silenced_prior_is_zero_for_everybody_and_still_knows_the_means() -> None:
    data = known_interactions()
    users = np.arange(40)
    prior = fit_item_mean(data, users)
    silent = prior.with_zero_mean()
    own = Ratings(np.array([0, 1], np.int64), np.array([5.0, 1.0], np.float32))
    np.testing.assert_array_equal(silent.values(own.items), [0, 0])
    np.testing.assert_array_equal(silent.values_without(own), [0, 0])
    np.testing.assert_array_equal(silent.without_text().values(own.items), prior.without_text().values(own.items))
