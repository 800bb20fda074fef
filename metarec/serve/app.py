"""The routes: each turns an HTTP request into a job for the worker, and its result into JSON."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route

from metarec.data.filters import MAX_CHARACTERS
from metarec.errors import ConfigError, ConflictError, MetarecError, StoreError
from metarec.serve.batching import BLOCK
from metarec.serve.engine import Engine
from metarec.serve.guard import Guard, error_body
from metarec.serve.person import Person
from metarec.serve.problems import PROBLEMS, faults, refuse_unknown_query
from metarec.serve.rankings import Ranked, Ranking
from metarec.serve.records import MAX_ID_CHARACTERS, Beside, Feedback, check_id
from metarec.serve.reference import add_reference
from metarec.serve.schema import (
    MOST_EXPLAINED,
    MOST_EXPORTED,
    MOST_INFORMATIVE,
    MOST_RECOMMENDED,
    Added,
    Asked,
    Erased,
    FeedbackAnswer,
    FeedbackBody,
    InformativeItem,
    InformativeItems,
    ItemId,
    Items,
    ItemsBody,
    KnownBody,
    NewItems,
    PreferenceAnswer,
    Preferences,
    Rating,
    RatingsBody,
    ReasonAnswer,
    Recommendations,
    Recommended,
    Removed,
    ScoresAnswer,
    SearchAnswer,
    SearchHit,
    UserAnswer,
    UserId,
    asked,
)
from metarec.serve.service import RefusedError, ServeSettings, Service, adapter_facts
from metarec.serve.worker import BusyError, Job, Wanted

_LOG = logging.getLogger(__name__)


def create_app(engine: Engine, settings: ServeSettings | None = None) -> FastAPI:
    """Returns the ASGI application.

    Args:
        engine: The engine to serve; from now on only the application's worker may use it.
        settings: Limits, queue length and timeouts.
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
        docs_url=None,  # both pages load scripts from elsewhere; see `reference`
        redoc_url=None,
        redirect_slashes=False,  # a route has one address, and a redirect would name the host that the client claims
        responses=PROBLEMS,
        dependencies=[Depends(refuse_unknown_query)],
    )
    app.add_middleware(Guard, limits=settings.limits, observe=service.observe, pseudonym=engine.store.pseudonym)
    app.state.service = service
    _add_errors(app)
    _add_user_routes(app, service)
    _add_preference_routes(app, service)
    _add_privacy_routes(app, service)
    _add_catalog_routes(app, service)
    _add_operator_routes(app, service)
    add_reference(app)
    if settings.ui:
        from metarec.serve.page import add_page

        add_page(app, service)
    return app


def _add_user_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/users/{user}/feedback", tags=["users"])
    async def feedback(
        user: UserId,
        said: FeedbackBody,
        idempotency_key: Annotated[
            str | None,
            Header(max_length=MAX_ID_CHARACTERS, description="A second request with the same key changes nothing."),
        ] = None,
    ) -> FeedbackAnswer:
        """Rate one item or several, or say what is known of a user. When the answer comes, it is durable and used."""
        ratings = [] if isinstance(said, KnownBody) else said.ratings if isinstance(said, RatingsBody) else [said]
        alone = {entry.item: entry.review for entry in ratings if entry.rating is None}
        read = await asyncio.to_thread(engine.read, alone) if alone else {}
        accepted, person = await service.feedback(
            Feedback(
                user,
                tuple((entry.item, read[entry.item] if entry.rating is None else entry.rating) for entry in ratings),
                idempotency_key,
                tuple(entry.beside for entry in ratings) if any(map(_came_with_more, ratings)) else (),
                said.about,
                None if said.friends is None else tuple(said.friends),
            )
        )
        return FeedbackAnswer(
            accepted=0 if accepted.replayed else len(ratings),
            replayed=accepted.replayed,
            adapter=adapter_facts(person),
            losses=list(person.losses),
            read=read,
            unknown=engine.unknown(person),
        )

    @app.get("/v1/users/{user}/recommendations", tags=["users"])
    async def recommendations(
        user: UserId,
        k: Annotated[int, Query(ge=1, le=MOST_RECOMMENDED, description="How many items.")] = 10,
        exclude_seen: Annotated[bool, Query(description="Leave out what the user has rated.")] = True,
        explain: Annotated[bool, Query(description="Add the ratings that changed each score most.")] = False,
        diversity: Annotated[
            float, Query(ge=0, le=1, description="0: by score alone; up to 1: items less and less alike.")
        ] = 0.0,
        where: Annotated[
            str | None,
            Query(max_length=MAX_CHARACTERS, description="Only items of which this holds, e.g. year >= 1990."),
        ] = None,
        block: Annotated[
            list[str] | None,
            Query(max_length=MOST_RECOMMENDED, description="Items to leave out, by id, or FIELD=CATEGORY; repeatable."),
        ] = None,
        *,
        now: Annotated[Asked, Depends(asked)],
    ) -> Recommendations:
        """Rank the whole catalog for a user; one without ratings gets the ranking before adaptation."""
        if explain and k > MOST_EXPLAINED:
            raise ConfigError(f"k is {k} with explain", f"Ask for {MOST_EXPLAINED} or fewer")

        wanted = Ranking(k, exclude_seen, explain, diversity, where, tuple(block or ()))

        def answer(found: Ranked) -> Recommendations:
            served, ranked = found
            ratings = served.adapted.predicted_ratings([entry.score for entry, _ in ranked])
            predicted: Sequence[float | None] = ratings or [None] * len(ranked)
            return Recommendations(
                adapter=adapter_facts(served),
                items=[
                    Recommended(
                        **vars(entry),
                        predicted_rating=rating,
                        because=[ReasonAnswer(**asdict(reason)) for reason in reasons],
                    )
                    for (entry, reasons), rating in zip(ranked, predicted, strict=True)
                ],
                unknown=engine.unknown(served),
            )

        cost = max(1.0, k * 2 / BLOCK) + (1.0 if explain else 0.0)
        ranking: Recommendations = await service.person(user, lambda person: Wanted(person, wanted, answer), now, cost)
        return ranking

    @app.post("/v1/users/{user}/score", tags=["users"])
    async def score(user: UserId, items: Items) -> ScoresAnswer:
        """Score some items for a user."""
        for item in items.items:
            engine.code(item)

        def answer(person: Person) -> ScoresAnswer:
            served, scores = engine.score(person, items.items)
            predicted = served.adapted.predicted_ratings(scores)
            return ScoresAnswer(
                adapter=adapter_facts(served),
                scores=scores,
                predicted_ratings=predicted,
                unknown=engine.unknown(served),
            )

        cost = max(1.0, len(items.items) / BLOCK)
        scored: ScoresAnswer = await service.person(user, answer, items.asked, cost)
        return scored


def _add_preference_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.get("/v1/users/{user}/preferences", tags=["users"])
    async def preferences(user: UserId) -> Preferences:
        """Return how much more a user is believed to like each category than others do, and how surely."""

        def answer(person: Person) -> Preferences:
            found = engine.knowledge(person)
            each = [PreferenceAnswer(**asdict(one)) for one in found.preferences]
            return Preferences(adapter=adapter_facts(person), known=found.known, preferences=each)

        believed: Preferences = await service.person(user, answer)
        return believed

    @app.get("/v1/users/{user}/informative", tags=["users"])
    async def informative(
        user: UserId,
        k: Annotated[int, Query(ge=1, le=MOST_INFORMATIVE, description="How many items.")] = 10,
        exclude: Annotated[
            list[str] | None,
            Query(max_length=MOST_RECOMMENDED, description="Ids of items that the user cannot rate; repeatable."),
        ] = None,
    ) -> InformativeItems:
        """Return the items whose ratings would tell most about a user: what to ask a new one first."""

        def answer(person: Person) -> InformativeItems:
            found = engine.informative(person, k, exclude or ())
            return InformativeItems(
                adapter=adapter_facts(person), items=[InformativeItem(**asdict(one)) for one in found]
            )

        chosen: InformativeItems = await service.person(user, answer)
        return chosen


def _came_with_more(rating: Rating) -> bool:
    return rating.beside != Beside()


def _add_privacy_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.get("/v1/users/{user}", tags=["users"])
    async def export(
        user: UserId,
        after: Annotated[int, Query(ge=0, le=2**62, description="Ratings of later versions than this.")] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_EXPORTED, description="How many ratings at most.")] = 1000,
    ) -> UserAnswer:
        """Return everything that is stored about a user; of many ratings a page, and where the next one begins."""
        held = await asyncio.to_thread(engine.store.export, check_id(user, "user id"), after, limit)
        if held is None:
            raise RefusedError(404, "there is no such user", "Give feedback first, or correct the id")
        return UserAnswer(**held)

    @app.delete("/v1/users/{user}", tags=["users"])
    async def erase(user: UserId) -> Erased:
        """Erase a user: ratings, adapters, index entries and caches."""
        if not await service.erase(check_id(user, "user id")):
            raise RefusedError(404, "there is no such user", "Give feedback first, or correct the id")
        return Erased(erased=True)


def _add_catalog_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/items", tags=["catalog"])
    async def add_items(new: ItemsBody) -> Added:
        """Add items; they can be recommended, rated and found at once."""
        items = [(entry.id, entry.fields) for entry in (new.items if isinstance(new, NewItems) else [new])]
        for item, _ in items:
            check_id(item, "item id")
        if len({item for item, _ in items}) < len(items):
            raise ConfigError("an item id comes twice", "Send every item once")
        added = await service.alone(lambda: engine.add_items(items))
        return Added(added=added, items=engine.recommendable)

    @app.delete("/v1/items/{item}", tags=["catalog"])
    async def remove_item(item: ItemId) -> Removed:
        """Remove an item for good: no ranking and no search holds it again; its ratings stay."""
        if not await service.alone(lambda: engine.remove_item(check_id(item, "item id"))):
            raise RefusedError(404, "there is no such item", "Find ids with GET /v1/search")
        return Removed(removed=True, items=engine.recommendable)

    @app.get("/v1/search", tags=["catalog"])
    async def search(
        q: Annotated[str, Query(min_length=1, max_length=200, description="Words of a title, or a description.")],
        k: Annotated[int, Query(ge=1, le=100)] = 10,
        user: Annotated[
            str | None,
            Query(min_length=1, max_length=MAX_ID_CHARACTERS, description="Also order by this user's scores."),
        ] = None,
        *,
        now: Annotated[Asked, Depends(asked)],
    ) -> SearchAnswer:
        """Find items by text."""
        if user is None and now:
            raise ConfigError("the question says something of a user, and names none", "Add user=ID")

        def answer(person: Person | None) -> SearchAnswer:
            hits = [SearchHit(**asdict(hit)) for hit in engine.search(q, k, person)]
            if person is None:
                return SearchAnswer(adapter=None, items=hits)
            return SearchAnswer(adapter=adapter_facts(person), items=hits, unknown=engine.unknown(person))

        if user is None:
            found: SearchAnswer = await service.ask(Job(lambda *_: answer(None)))
        else:
            found = await service.person(user, answer, now)
        return found


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.get("/healthz", tags=["operators"])
    async def healthz() -> dict[str, str]:
        """Say that the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operators"])
    async def readyz() -> dict[str, str]:
        """Say whether the service can store feedback and run its model now."""
        await service.ready()
        return {"status": "ready"}

    @app.get("/version", tags=["operators"])
    async def versions() -> dict[str, str]:
        """Return the versions of metarec, the API, the recommender, its language model and its task."""
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
        """Return metrics in Prometheus' format."""
        return PlainTextResponse(generate_latest(service.registry), media_type="text/plain; version=0.0.4")


def _methods(request: Request) -> list[str]:
    """Returns the methods that the routes of a path take; the framework names those of the first route alone."""
    routes = (route for route in request.app.routes if isinstance(route, Route))
    found = [route.methods or () for route in routes if route.path_regex.match(request.scope["path"])]
    return sorted({method for methods in found for method in methods})


def _add_errors(app: FastAPI) -> None:
    def problem(status: int, message: str, cure: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
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
        # What a client named may not even be text.
        message, cure = (text.encode("utf-8", "replace").decode() for text in faults(error.errors()))
        return problem(422, message, cure)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        message, cure = str(error.detail), error.cure if isinstance(error, RefusedError) else "See /openapi.json"
        if message == HTTPStatus.NOT_FOUND.phrase:
            message, cure = "there is no such route", "See /openapi.json; a '/' inside an id is written %2F"
        elif message == HTTPStatus.METHOD_NOT_ALLOWED.phrase:
            message, cure = f"this route does not take {request.method}", "See /openapi.json"
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request))
        return problem(error.status_code, message, cure, headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        return problem(500, "something broke here", "It is in the log; please report it")
