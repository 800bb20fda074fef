"""What the tests of the service share: small fitted recommenders, and ratings of a known taste."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from small_recommenders import NO_MODEL, SETTINGS, WITH_PROCESS, known_task

from metarec.config import RunConfig, validated
from metarec.recommender import MetaRecommender

LOVES_DRAMA = (("m0", 5.0), ("m4", 4.5), ("m1", 5.0), ("m2", 1.0), ("m3", 1.5))
LOVES_HORROR = tuple((item, 5.5 - rating) for item, rating in LOVES_DRAMA)


@functools.cache
def small_recommender(model: Path) -> MetaRecommender:
    return MetaRecommender.from_pretrained(model, validated(RunConfig, SETTINGS | WITH_PROCESS, "test")).fit(
        known_task()
    )


@functools.cache
def recommender_without_model() -> MetaRecommender:
    """Returns a recommender that takes a second: item means and a Gaussian process on genres."""
    settings = NO_MODEL | {"score": ["item mean", "collaborative"]}
    settings["collaborative"] = {"features": ["fields"], "members": "gp"}
    return MetaRecommender(None, validated(RunConfig, settings, "test")).fit(known_task())


@contextmanager
def listening(application: Any, **settings: Any) -> Iterator[str]:
    """Serves an application from a thread of this process, and gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application, port=0, log_config=None, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
