"""What the tests of the service share: one small fitted recommender a session, and ratings of a known taste."""

from __future__ import annotations

import functools
from pathlib import Path

from small_recommenders import SETTINGS, WITH_PROCESS, known_task

from metarec.config import RunConfig, validated
from metarec.recommender import MetaRecommender

LOVES_DRAMA = (("m0", 5.0), ("m4", 4.5), ("m1", 5.0), ("m2", 1.0), ("m3", 1.5))
LOVES_HORROR = tuple((item, 5.5 - rating) for item, rating in LOVES_DRAMA)


@functools.cache
def small_recommender(model: Path) -> MetaRecommender:
    return MetaRecommender.from_pretrained(model, validated(RunConfig, SETTINGS | WITH_PROCESS, "test")).fit(
        known_task()
    )
