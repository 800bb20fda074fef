"""Serves a page to try the service on: rate a few titles, and see how the ranking changes and why.

The server renders HTML; the page's scripts replace the parts that change, and forms work without scripts too. The page
loads nothing from elsewhere. A visitor is a user like any other, named by a random id in a cookie.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import jinja2
import numpy as np
from fastapi import Cookie, FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from metarec.adapted_user import Recommendation
from metarec.errors import ConfigError, MetarecError, StoreError
from metarec.recommending.explanations import Reason
from metarec.serve.batching import BLOCK
from metarec.serve.page_facts import (
    Because,
    Moved,
    Named,
    RankedItem,
    RatedItem,
    about_fields,
    bars,
    choices,
    moves,
    ranking_said,
)
from metarec.serve.person import Person
from metarec.serve.records import MAX_ID_CHARACTERS, Feedback
from metarec.serve.service import Service
from metarec.serve.worker import BusyError
from metarec.training.given_side import about_readers

_HERE = Path(__file__).parent
_COOKIE = "metarec_visitor"
_SHOWN = 10
_FOUND = 6
_MOST_SKIPPED = 120
# Places before the last rating are known among so many items, which are scored anyway, for so many visitors.
_COMPARED = BLOCK // 2
_REMEMBERED = 1000
_FILES = {
    "page.css": "text/css",
    **dict.fromkeys(("page.js", "parts.js", "toolbar.js", "glide.js"), "text/javascript"),
}

Visitor = Annotated[str | None, Cookie(alias=_COOKIE, pattern="^page-[A-Za-z0-9_-]{16,64}$", include_in_schema=False)]
Text = Annotated[str, Query(max_length=200)]
Skipped = Annotated[list[Annotated[str, Query(max_length=MAX_ID_CHARACTERS)]] | None, Query(max_length=_MOST_SKIPPED)]

Ranked = list[tuple[Recommendation, list[Reason]]]


class PageContent:
    """The facts that the page's templates show, from the engine.

    Args:
        service: Runs the jobs.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._engine = service.engine
        self._choices = choices(self._engine.trained.fitted.scale)
        # By users' random keys, which other servers know those by whom they erase.
        self._moved: dict[str, Moved] = {}
        self._first: tuple[int, dict[str, int]] = (-1, {})
        self._engine.forget_with(lambda key: self._moved.pop(key, None))

    def _named(self, item: str) -> Named:
        return Named.of(self._engine.catalog, item, self._engine.code(item))

    def _first_places(self) -> Mapping[str, int]:
        """Returns the places of a new user's ranking, computed again where items have come or gone."""
        if self._first[0] != (items := self._engine.recommendable):
            ranked = self._engine.recommend(Person(self._engine.new_user, 0, 0), _COMPARED)[1]
            self._first = items, _places(ranked)
        return self._first[1]

    async def shown(self, user: str, *, why: bool = False, last: tuple[str, float] | None = None) -> dict[str, Any]:
        """Returns a visitor's ranking, each item with its former place, their ratings, and what is believed of them.

        Args:
            user: The visitor.
            why: Adds the ratings that moved each item, which takes longer with every rating.
            last: The item that was rated just now, and its rating.
        """
        engine = self._engine

        def answer(person: Person) -> dict[str, Any]:
            served, ranked = engine.recommend(person, _COMPARED)
            moved = self._compare(user, person, _places(ranked), last)
            best = [entry for entry, _ in ranked[:_SHOWN]]
            support = served.adapted.support
            codes = [engine.code(entry.item) for entry in best]
            reasons = engine.explain(served, np.array(codes, np.int64)) if why else [[] for _ in best]
            ratings = served.adapted.predicted_ratings([entry.score for entry in best])
            predicted: Sequence[float | None] = ratings or [None] * len(best)
            found = engine.knowledge(served)
            about = support.side.about if support.side is not None else {}
            rows = [
                RankedItem(
                    **vars(Named.of(engine.catalog, entry.item, code)),
                    score=entry.score,
                    rating=rating,
                    was=moved.before.get(entry.item),
                    because=[Because(self._named(one.item).title, one.rating, one.moved) for one in because],
                )
                for entry, code, rating, because in zip(best, codes, predicted, reasons, strict=True)
            ]
            return {
                "adapter": served.facts(),
                "version": served.version,
                "losses": list(served.losses),
                "rows": rows,
                "ratings": [
                    RatedItem(**vars(Named.of(engine.catalog, engine.catalog.ids[code], code)), value=float(value))
                    for code, value in zip(support.items.tolist(), support.values, strict=True)
                ],
                "since": moved.since,
                "moves": moves(rows),
                "why": why,
                "known": found.known,
                "bars": bars(found.preferences),
                "fields": about_fields(about_readers(engine.trained.fitted), about),
            }

        facts: dict[str, Any] = await self._service.person(user, answer)
        return facts

    def _compare(self, user: str, person: Person, places: Mapping[str, int], last: tuple[str, float] | None) -> Moved:
        """Returns what a ranking is compared with, and remembers the ranking for the next one."""
        profile = self._engine.store.profile(user)
        old = None if profile is None else self._moved.get(profile.key)
        if old is not None and old.version == person.version:
            return old
        before = old.places if old is not None else self._first_places()
        follows = person.version == (0 if old is None else old.version) + 1
        since = RatedItem(**vars(self._named(last[0])), value=last[1]) if last and follows else None
        moved = Moved(person.version, places, before, since)
        if profile is not None:  # otherwise erased in the meantime, or nobody yet
            self._moved[profile.key] = moved
        while len(self._moved) > _REMEMBERED:
            self._moved.pop(next(iter(self._moved)))
        return moved

    async def found(self, user: str, q: str, skip: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the items that a query finds, or without one those whose ratings would tell most, and the ratings.

        Args:
            user: The visitor.
            q: The query.
            skip: Items that the visitor does not know.
        """
        engine = self._engine

        def answer(person: Person) -> dict[str, Any]:
            support = person.adapted.support
            ids = [engine.catalog.ids[code] for code in support.items]
            rated = dict(zip(ids, (float(value) for value in support.values), strict=True))
            telling: list[str] = []
            if q.strip():
                hits = [hit.item for hit in engine.search(q, _FOUND)]
            else:
                hits = telling = [one.item for one in engine.informative(person, _FOUND, skip)]
                hits = hits or list(self._first_places())[:_FOUND]
            return {
                "found": [self._named(item) for item in hits],
                "rated": rated,
                "query": q.strip(),
                "telling": bool(telling),
                "skipped": [*skip, *telling][-_MOST_SKIPPED:],
            }

        facts: dict[str, Any] = await self._service.person(user, answer)
        return facts | {"choices": self._choices}

    async def rate(self, user: str, item: str, rating: float) -> str:
        """Adds a rating; returns the item's title."""
        await self._service.feedback(Feedback(user, ((item, rating),)))
        return self._named(item).title

    async def tell(self, user: str, about: Mapping[str, str]) -> None:
        """Keeps what visitors say about themselves."""
        await self._service.feedback(Feedback(user, (), about=dict(about)))

    async def erase(self, user: str) -> None:
        """Removes a visitor everywhere."""
        await self._service.erase(user)


def add_page(app: FastAPI, service: Service) -> None:
    """Adds the page's routes."""
    loader = jinja2.FileSystemLoader(_HERE / "templates")
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    content = PageContent(service)

    def render(name: str, facts: Mapping[str, Any], status: int = 200) -> HTMLResponse:
        return HTMLResponse(templates.get_template(name).render(**facts), status)

    async def whole(
        user: str, q: str = "", skip: Sequence[str] = (), *, why: bool = False, problem: str = "", status: int = 200
    ) -> HTMLResponse:
        facts = {"q": q, "problem": problem}
        facts |= await content.shown(user, why=why) | await content.found(user, q, skip)
        return render("page.html", facts, status)

    async def change(
        request: Request, visitor: str | None, work: Callable[[str, Mapping[str, str]], Awaitable[dict[str, Any]]]
    ) -> Response:
        """Does what a form says, and returns the parts of the page that it changes, or the page."""
        user = _known(visitor)
        form = {name: values[0] for name, values in parse_qs(await _text(request), keep_blank_values=True).items()}
        scripted = "metarec-parts" in request.headers
        try:
            said = await work(user, form)
        except MetarecError as error:
            if scripted or isinstance(error, BusyError | StoreError):
                raise
            return await whole(user, problem=str(error), status=422)
        if not scripted:
            return RedirectResponse("/", 303)
        facts = await content.shown(user, last=said.get("last"))
        return render("changed.html", {**facts, "said": f"{said['said']} {ranking_said(facts)}"})

    @app.get("/", include_in_schema=False)
    async def page(visitor: Visitor = None, q: Text = "", skip: Skipped = None, why: bool = False) -> HTMLResponse:
        user = visitor or f"page-{secrets.token_urlsafe(24)}"
        response = await whole(user, q, skip or (), why=why)
        response.set_cookie(_COOKIE, user, httponly=True, samesite="strict", max_age=30 * 86400)
        return response

    @app.get("/ui/find", include_in_schema=False)
    async def find(visitor: Visitor = None, q: Text = "", skip: Skipped = None) -> HTMLResponse:
        return render("found.html", await content.found(visitor or "page-nobody", q, skip or ()))

    @app.get("/ui/ranking", include_in_schema=False)
    async def ranking(visitor: Visitor = None, why: bool = False) -> HTMLResponse:
        return render("ranking.html", await content.shown(_known(visitor), why=why))

    @app.post("/ui/rate", include_in_schema=False)
    async def rate(request: Request, visitor: Visitor = None) -> Response:
        async def work(user: str, form: Mapping[str, str]) -> dict[str, Any]:
            try:
                rating = float(form["rating"])
            except (KeyError, ValueError):
                raise ConfigError("the form has no rating", "Choose one of the numbers") from None
            item = form.get("item", "")
            title = await content.rate(user, item, rating)
            return {"said": f"You gave {title} {rating:g}.", "last": (item, rating)}

        return await change(request, visitor, work)

    @app.post("/ui/about", include_in_schema=False)
    async def about(request: Request, visitor: Visitor = None) -> Response:
        async def work(user: str, form: Mapping[str, str]) -> dict[str, Any]:
            await content.tell(user, form)
            return {"said": "What you said of yourself is used."}

        return await change(request, visitor, work)

    @app.post("/ui/forget", include_in_schema=False)
    async def forget(request: Request, visitor: Visitor = None) -> Response:
        async def work(user: str, form: Mapping[str, str]) -> dict[str, Any]:
            await content.erase(user)
            return {"said": "You are forgotten."}

        return await change(request, visitor, work)

    @app.get("/ui/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404)
        return FileResponse(_HERE / "static" / name, media_type=_FILES[name])


async def _text(request: Request) -> str:
    return (await request.body()).decode("utf-8", "replace")


def _places(ranked: Ranked) -> dict[str, int]:
    """Returns every ranked item's place, the best one's being 1."""
    return {entry.item: place for place, (entry, _) in enumerate(ranked, start=1)}


def _known(visitor: str | None) -> str:
    if visitor is None:
        raise ConfigError("the page needs its cookie", "Open / first, with cookies allowed")
    return visitor
