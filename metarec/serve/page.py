"""Serves a page to try the service on: rate a few titles, and see how the ranking changes and why.

The server renders HTML, htmx replaces the parts that change, and forms work without scripts too. The page loads nothing
from elsewhere. A visitor is a user like any other, named by a random id in a cookie.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import jinja2
from fastapi import Cookie, FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from metarec.adapted_user import Recommendation
from metarec.errors import ConfigError
from metarec.explanations import Reason
from metarec.serve.person import Person
from metarec.serve.records import Feedback
from metarec.serve.service import Service

_HERE = Path(__file__).parent
_COOKIE = "metarec_visitor"
_SHOWN = 10
_FOUND = 8
# Places before the last rating are known among so many items, for so many visitors.
_COMPARED = 100
_REMEMBERED = 1000
_FILES = {"page.css": "text/css", "htmx.min.js": "text/javascript"}

Visitor = Annotated[str | None, Cookie(alias=_COOKIE, pattern="^page-[A-Za-z0-9_-]{16,64}$", include_in_schema=False)]

Ranked = list[tuple[Recommendation, list[Reason]]]


@dataclass(frozen=True)
class ItemRow:
    """A line of the ranking; `was` is the item's place before the last rating, None where it was not near the top."""

    title: str
    score: float
    was: int | None
    because: list[Reason]


class PageContent:
    """The facts that the page's templates show, from the engine.

    Args:
        service: Runs the jobs.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._engine = service.engine
        scale = self._engine.trained.fitted.scale
        self._choices = list(range(math.ceil(scale.low), math.floor(scale.high) + 1))
        # By users' random keys, which other servers know those by whom they erase.
        self._places: dict[str, dict[str, int]] = {}
        self._engine.forget_with(lambda key: self._places.pop(key, None))

    def _best_for_new_user(self, k: int) -> Ranked:
        return self._engine.recommend(Person(self._engine.new_user, 0, 0), k)[1]

    async def ranking(self, user: str) -> dict[str, Any]:
        """Returns a visitor's ranking, each item with its former place, and their ratings."""
        engine = self._engine

        def answer(person: Person) -> dict[str, Any]:
            served, ranked = engine.recommend(person, _SHOWN, explain=True)
            support = served.adapted.support
            titles = [engine.catalog.title(int(code)) for code in support.items]
            before = self._places.get(self._key(user)) or _places(self._best_for_new_user(_COMPARED))
            rows = [ItemRow(entry.title, entry.score, before.get(entry.item), reasons) for entry, reasons in ranked]
            return {
                "adapter": served.facts(),
                "losses": list(served.losses),
                "rows": rows,
                "ratings": [
                    {"title": title, "value": float(value)} for title, value in zip(titles, support.values, strict=True)
                ],
            }

        facts: dict[str, Any] = await self._service.person(user, answer)
        return facts

    async def found(self, user: str, q: str) -> dict[str, Any]:
        """Returns the items that a query finds, or without one those to start with, and the visitor's ratings."""
        engine = self._engine

        def answer(person: Person) -> dict[str, Any]:
            support = person.adapted.support
            ids = [engine.catalog.ids[code] for code in support.items]
            rated = dict(zip(ids, (float(value) for value in support.values), strict=True))
            if q.strip():
                return {"found": engine.search(q, _FOUND), "rated": rated}
            return {"found": [entry for entry, _ in self._best_for_new_user(_FOUND)], "rated": rated}

        facts: dict[str, Any] = await self._service.person(user, answer)
        return facts | {"choices": self._choices}

    async def rate(self, user: str, item: str, rating: float) -> None:
        """Adds a rating, and remembers the places that items had before it."""
        before = await self._service.person(user, lambda person: self._engine.recommend(person, _COMPARED)[1])
        await self._service.feedback(Feedback(user, ((item, rating),)))
        await self._service.alone(lambda: self._remember(user, _places(before)))

    def _remember(self, user: str, places: dict[str, int]) -> None:
        if key := self._key(user):  # otherwise erased in the meantime
            self._places[key] = places
        while len(self._places) > _REMEMBERED:
            self._places.pop(next(iter(self._places)))

    def _key(self, user: str) -> str:
        profile = self._engine.store.profile(user)
        return "" if profile is None else profile.key

    async def erase(self, user: str) -> None:
        """Removes a visitor everywhere."""
        await self._service.erase(user)


def add_page(app: FastAPI, service: Service) -> None:
    """Adds the page's routes."""
    loader = jinja2.FileSystemLoader(_HERE / "templates")
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    content = PageContent(service)

    def render(name: str, user: str | None, facts: dict[str, Any]) -> HTMLResponse:
        response = HTMLResponse(templates.get_template(name).render(**facts))
        if user is not None:
            response.set_cookie(_COOKIE, user, httponly=True, samesite="strict", max_age=30 * 86400)
        return response

    async def after_change(request: Request, user: str) -> Response:
        if request.headers.get("hx-request") != "true":
            return RedirectResponse("/", 303)
        return render("ranking.html", None, await content.ranking(user))

    @app.get("/", include_in_schema=False)
    async def page(visitor: Visitor = None, q: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
        user = visitor or f"page-{secrets.token_urlsafe(24)}"
        facts = {"q": q, **await content.ranking(user), **await content.found(user, q)}
        return render("page.html", user, facts)

    @app.get("/ui/find", include_in_schema=False)
    async def find(visitor: Visitor = None, q: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
        return render("found.html", None, await content.found(visitor or "page-nobody", q))

    @app.post("/ui/rate", include_in_schema=False)
    async def rate(request: Request, visitor: Visitor = None) -> Response:
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        user = _known(visitor)
        try:
            rating = float(form["rating"][0])
        except (KeyError, ValueError):
            raise ConfigError("the form has no rating", "Choose one of the numbers") from None
        await content.rate(user, form.get("item", [""])[0], rating)
        return await after_change(request, user)

    @app.post("/ui/forget", include_in_schema=False)
    async def forget(request: Request, visitor: Visitor = None) -> Response:
        user = _known(visitor)
        await content.erase(user)
        return await after_change(request, user)

    @app.get("/ui/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404)
        return FileResponse(_HERE / "static" / name, media_type=_FILES[name])


def _places(ranked: Ranked) -> dict[str, int]:
    """Returns every ranked item's place, the best one's being 1."""
    return {entry.item: place for place, (entry, _) in enumerate(ranked, start=1)}


def _known(visitor: str | None) -> str:
    if visitor is None:
        raise ConfigError("the page needs its cookie", "Open / first, with cookies allowed")
    return visitor
