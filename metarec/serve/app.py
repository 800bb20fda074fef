"""The routes: HTTP in, jobs for the worker, JSON out. Knows nothing of tensors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from metarec.errors import ConfigError, ConflictError, MetarecError, StoreError
from metarec.serve.engine import Engine, Person
from metarec.serve.guard import Guard, Limits, error_body
from metarec.serve.worker import BusyError, Job, Worker
from metarec.store import MAX_ID_CHARACTERS, Accepted, Feedback, check_id

_LOG = logging.getLogger(__name__)
_MOST_RECOMMENDED = 1000
_MOST_EXPLAINED = 50
_MOST_AT_ONCE = 100

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARACTERS)]
UserId = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARACTERS, description="Any text without '/'.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rating(_Strict):
    """One rating."""

    item: Id
    rating: float = Field(allow_inf_nan=False, description="On the scale of the recommender's task.")


class Ratings(_Strict):
    """Several ratings, oldest first."""

    ratings: list[Rating] = Field(min_length=1, max_length=_MOST_AT_ONCE)


class Items(_Strict):
    """Items to score."""

    items: list[Id] = Field(min_length=1, max_length=_MOST_RECOMMENDED)


class NewItem(_Strict):
    """An item that the recommender was not trained with."""

    id: Id
    fields: dict[str, Annotated[str, Field(max_length=2000)]] = Field(
        description="The catalog's text fields; 'title' is needed."
    )


class NewItems(_Strict):
    """Several new items."""

    items: list[NewItem] = Field(min_length=1, max_length=_MOST_AT_ONCE)


class Adapter(BaseModel):
    """The adapter that an answer was made with."""

    version: int = Field(description="How many ratings the user had given when it was adapted; 0: none, the prior.")
    ratings: int = Field(description="How many items it was adapted to.")
    diverged: bool = Field(description="Adapting failed numerically: the ranking before adaptation is served.")
    stale: bool = Field(description="A newer version could not be computed; this is the last good one.")


class FeedbackAnswer(BaseModel):
    """What became of feedback; it is durable."""

    accepted: int
    replayed: bool = Field(description="The idempotency key had been accepted before; nothing changed.")
    adapter: Adapter
    losses: list[float] = Field(description="Loss on the user's ratings before each adaptation step.")


class ReasonAnswer(BaseModel):
    """A rated item, and how much lower the recommended item's score is without that rating."""

    item: str
    title: str
    rating: float
    moved: float


class Recommended(BaseModel):
    """One recommended item."""

    item: str
    title: str
    score: float
    because: list[ReasonAnswer] = []


class Recommendations(BaseModel):
    """A ranking of the whole catalog."""

    adapter: Adapter
    items: list[Recommended]


class Scores(BaseModel):
    """Scores in the order of the question; higher is better."""

    adapter: Adapter
    scores: list[float]


class SearchHit(BaseModel):
    """An item found by text."""

    item: str
    title: str
    similarity: float
    score: float | None


class SearchAnswer(BaseModel):
    """Items found by text, best first."""

    adapter: Adapter | None
    items: list[SearchHit]


class Event(BaseModel):
    """One rating as the log holds it; `at` is seconds since the epoch."""

    version: int
    item: str
    rating: float
    at: float


class UserAnswer(BaseModel):
    """Everything that is held of a user."""

    user: str
    created: float
    version: int
    ratings: list[Event]
    adapters: list[dict[str, int | str]]


class Added(BaseModel):
    """How many items were new, and how many can be recommended now."""

    added: int
    items: int


class Erased(BaseModel):
    """The user is gone."""

    erased: bool


class ErrorBody(BaseModel):
    """What was wrong, and what to do about it."""

    status: int
    message: str
    cure: str


class Problem(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


_WHEN = {
    400: "not JSON",
    401: "no API key",
    403: "from another site, or not from this machine",
    404: "unknown user",
    409: "contradicts what is there",
    413: "body too large",
    422: "not understood",
    429: "too often, or the queue is full: see Retry-After",
    503: "the store does not answer, or not in time",
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text} for status, text in _WHEN.items()
}


@dataclass(frozen=True)
class ServeSettings:
    """How the service runs.

    Args:
        limits: Keys, rates and sizes.
        waiting: Requests that may wait for the model.
        seconds: After which a request is given up.
        ui: Serves the page.
    """

    limits: Limits = field(default_factory=Limits)
    waiting: int = 64
    seconds: float = 30.0
    ui: bool = False


class _State(Collector):
    """Numbers that are read off the engine when somebody asks."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        worker, engine = self._worker, self._worker.engine
        gauges = {
            "queue_depth": ("requests that wait for the model", worker.depth),
            "hot_adapters": ("adapters in memory", len(engine.hot)),
            "hot_adapter_bytes": ("bytes of adapters in memory", engine.hot.bytes),
            "items": ("items that can be recommended", len(engine.catalog)),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"metarec_{name}", what, value)
        counters = engine.counters
        counts = {
            "adapted_users": ("adapters computed", counters.adapted),
            "diverged": ("adapters that met a number that is not finite", counters.diverged),
            "damaged_adapters": ("adapters refused because a byte was altered", counters.damaged),
            "failed_adaptations": ("adapters that could not be computed", counters.failed),
            "unsaved_adapters": ("adapters that could not be written", counters.unsaved),
            "hot_hits": ("adapters found in memory", engine.hot.hits),
            "hot_misses": ("adapters not found in memory", engine.hot.misses),
            "batches": ("batches that the model worked on", worker.batches),
            "jobs": ("requests that the model worked on", worker.jobs),
        }
        for name, (what, value) in counts.items():
            yield CounterMetricFamily(f"metarec_{name}", what, value)


class Service:
    """The worker and the metrics of one application; `ask` is how routes reach the model."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.settings = settings
        self.worker = Worker(engine, settings.waiting)
        self.registry = CollectorRegistry()
        self.registry.register(_State(self.worker))
        self._requests = Counter("metarec_requests", "answers", ["method", "route", "status"], registry=self.registry)
        self._seconds = Histogram("metarec_seconds", "seconds to an answer", ["route"], registry=self.registry)

    @property
    def engine(self) -> Engine:
        """The engine; only a job may compute with it."""
        return self.worker.engine

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        known = method if method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS") else "other"
        self._requests.labels(known, route, status).inc()
        self._seconds.labels(route).observe(seconds)

    async def ask(self, job: Job) -> Any:
        """Waits for the worker to do a job.

        Raises:
            BusyError: The queue is full.
            HTTPException: It did not come to an end in time.
        """
        future = asyncio.wrap_future(self.worker.submit(job))
        try:
            return await asyncio.wait_for(future, self.settings.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(503, "the answer takes too long", {"Retry-After": "5"}) from None

    async def person(self, user: str, answer: Callable[[Person], Any]) -> Any:
        """Does something with a user's adapter in the worker."""

        def run(person: Person | None, _: Accepted | None) -> Any:
            assert person is not None
            return answer(person)

        return await self.ask(Job(run, check_id(user, "user id")))

    async def alone(self, answer: Callable[[], Any]) -> Any:
        """Does something between two batches."""
        return await self.ask(Job(lambda *_: answer(), alone=True))

    async def feedback(self, user: str, ratings: list[tuple[str, float]], key: str | None) -> tuple[Accepted, Person]:
        """Writes ratings to the log and adapts.

        Raises:
            MetarecError: An item is unknown, a rating off the scale, or the key contradicts an earlier one.
        """
        engine, scale = self.engine, self.engine.trained.fitted.scale
        for item, rating in ratings:
            engine.code(item)
            scale.check(rating, "an item")
        said = Feedback(check_id(user, "user id"), tuple(ratings), None if key is None else check_id(key, "key"))
        both: tuple[Accepted, Person] = await self.ask(Job(lambda person, done: (done, person), user, said))
        return both

    async def erase(self, user: str) -> bool:
        """Removes a user everywhere; when it returns, nothing of them is left."""

        def run() -> bool:
            self.worker.settle()
            return self.engine.erase(user)

        return bool(await self.alone(run))


def create_app(engine: Engine, settings: ServeSettings | None = None) -> FastAPI:
    """Returns the ASGI application.

    Args:
        engine: What it serves; the application's worker is the only one to use it from now on.
        settings: How it runs.
    """
    settings = settings or ServeSettings()
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close, 3.0)
        engine.store.close()

    app = FastAPI(
        title="metarec",
        version=version("metarec"),
        summary="Rate five things, and be served by your own adapter.",
        lifespan=lifespan,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
        responses=_PROBLEMS,
    )
    app.add_middleware(Guard, limits=settings.limits, observe=service.observe)
    app.state.service = service
    _add_errors(app)
    _add_user_routes(app, service)
    _add_catalog_routes(app, service)
    _add_operator_routes(app, service)
    if settings.ui:
        from metarec.serve.page import add_page

        add_page(app, service)
    return app


def _add_user_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/users/{user}/feedback", tags=["users"])
    async def feedback(
        user: UserId,
        said: Ratings | Rating,
        idempotency_key: Annotated[
            str | None, Header(max_length=MAX_ID_CHARACTERS, description="The same key again changes nothing.")
        ] = None,
    ) -> FeedbackAnswer:
        """Say what a user thinks of one item or several. Durable and adapted to when the answer comes."""
        ratings = said.ratings if isinstance(said, Ratings) else [said]
        pairs = [(entry.item, entry.rating) for entry in ratings]
        accepted, person = await service.feedback(user, pairs, idempotency_key)
        return FeedbackAnswer(
            accepted=0 if accepted.replayed else len(pairs),
            replayed=accepted.replayed,
            adapter=_adapter(person),
            losses=list(person.losses),
        )

    @app.get("/v1/users/{user}/recommendations", tags=["users"])
    async def recommendations(
        user: UserId,
        k: Annotated[int, Query(ge=1, le=_MOST_RECOMMENDED, description="How many items.")] = 10,
        exclude_seen: Annotated[bool, Query(description="Leave out what the user has rated.")] = True,
        explain: Annotated[bool, Query(description="Add the ratings that moved each score most.")] = False,
    ) -> Recommendations:
        """Rank the whole catalog for a user; for one without ratings, as for anybody."""
        if explain and k > _MOST_EXPLAINED:
            raise ConfigError(f"k is {k} with explain", f"Ask for {_MOST_EXPLAINED} or fewer")

        def answer(person: Person) -> Recommendations:
            served, ranked = engine.recommend(person, k, exclude_seen=exclude_seen, explain=explain)
            return Recommendations(
                adapter=_adapter(served),
                items=[
                    Recommended(**vars(entry), because=[ReasonAnswer(**asdict(reason)) for reason in reasons])
                    for entry, reasons in ranked
                ],
            )

        ranking: Recommendations = await service.person(user, answer)
        return ranking

    @app.post("/v1/users/{user}/score", tags=["users"])
    async def score(user: UserId, items: Items) -> Scores:
        """Score some items for a user."""
        for item in items.items:
            engine.code(item)

        def answer(person: Person) -> Scores:
            served, scores = engine.score(person, items.items)
            return Scores(adapter=_adapter(served), scores=scores)

        scored: Scores = await service.person(user, answer)
        return scored

    @app.get("/v1/users/{user}", tags=["users"])
    async def export(user: UserId) -> UserAnswer:
        """Hand out everything that is held of a user."""
        held = await service.ask(Job(lambda *_: engine.store.export(check_id(user, "user id"))))
        if held is None:
            raise HTTPException(404, "there is no such user")
        return UserAnswer(**held)

    @app.delete("/v1/users/{user}", tags=["users"])
    async def erase(user: UserId) -> Erased:
        """Erase a user: ratings, adapters, index, caches. Nothing is left."""
        if not await service.erase(check_id(user, "user id")):
            raise HTTPException(404, "there is no such user")
        return Erased(erased=True)


def _add_catalog_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/items", tags=["catalog"])
    async def add_items(new: NewItems | NewItem) -> Added:
        """Add items; they can be recommended, rated and found at once."""
        items = [(entry.id, entry.fields) for entry in (new.items if isinstance(new, NewItems) else [new])]
        for item, _ in items:
            check_id(item, "item id")
        if len({item for item, _ in items}) < len(items):
            raise ConfigError("an item id comes twice", "Send every item once")
        added = await service.alone(lambda: engine.add_items(items))
        return Added(added=added, items=len(engine.catalog))

    @app.get("/v1/search", tags=["catalog"])
    async def search(
        q: Annotated[str, Query(min_length=1, max_length=200, description="Words of a title, or a description.")],
        k: Annotated[int, Query(ge=1, le=100)] = 10,
        user: Annotated[
            str | None, Query(min_length=1, max_length=MAX_ID_CHARACTERS, description="Whose taste counts too.")
        ] = None,
    ) -> SearchAnswer:
        """Find items by text."""

        def answer(person: Person | None, _: Accepted | None) -> SearchAnswer:
            found = engine.search(q, k, person)
            hits = [SearchHit(**asdict(hit)) for hit in found]
            return SearchAnswer(adapter=None if person is None else _adapter(person), items=hits)

        found: SearchAnswer = await service.ask(Job(answer, None if user is None else check_id(user, "user id")))
        return found


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    engine, worker = service.engine, service.worker

    @app.get("/healthz", tags=["operators"])
    async def healthz() -> dict[str, str]:
        """Say that the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operators"])
    async def readyz() -> dict[str, str]:
        """Say whether requests would be answered now."""
        await asyncio.to_thread(engine.store.ping)
        if not worker.alive:
            raise StoreError("the worker does not run", "Start the service again")
        return {"status": "ready"}

    @app.get("/version", tags=["operators"])
    async def versions() -> dict[str, str]:
        """Say what is served."""
        fitted = engine.trained.fitted
        return {
            "metarec": version("metarec"),
            "api": "v1",
            "recommender": engine.digest,
            "backbone": engine.trained.backbone.fingerprint,
            "task": f"{fitted.task.name} v{fitted.task.version}",
        }

    @app.get("/metrics", tags=["operators"], response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Hand out metrics in Prometheus' format."""
        return PlainTextResponse(generate_latest(service.registry), media_type="text/plain; version=0.0.4")


def _adapter(person: Person) -> Adapter:
    return Adapter.model_validate(person.facts())


def _add_errors(app: FastAPI) -> None:
    def problem(status: int, message: str, cure: str = "", headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(error_body(status, message, cure), status, headers)

    @app.exception_handler(MetarecError)
    async def refused(_: Request, error: MetarecError) -> JSONResponse:
        if isinstance(error, BusyError):
            return problem(429, error.problem, error.cure, {"Retry-After": str(error.seconds)})
        if isinstance(error, ConflictError):
            return problem(409, error.problem, error.cure)
        if isinstance(error, StoreError):
            _LOG.error("the store failed", extra={"failure": type(error).__name__})
            return problem(503, "the store does not answer", "Try again later", {"Retry-After": "5"})
        return problem(422, error.problem, error.cure)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Where and what, but not the value: it is somebody's, and may not even be text.
        places = [".".join(map(str, entry["loc"])) + ": " + str(entry["msg"]) for entry in error.errors()[:5]]
        return problem(422, "; ".join(place.encode("utf-8", "replace").decode() for place in places))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        return problem(500, "something broke here", "It is in the log; please report it")
