"""A page to try the service on: rate a few titles, watch the ranking move, see why.

HTML from the server, htmx for the parts that change, no request to anywhere else; forms work without scripts too. The
visitor is a random name in a cookie, a user like any other. Knows nothing that the routes do not.
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

from metarec.errors import ConfigError
from metarec.serve.engine import Person, Reason
from metarec.serve.service import Service
from metarec.serve.worker import Job

_HERE = Path(__file__).parent
_COOKIE = "metarec_visitor"
_SHOWN = 10
_FOUND = 8
_FILES = {"page.css": "text/css", "htmx.min.js": "text/javascript"}

Visitor = Annotated[str | None, Cookie(alias=_COOKIE, pattern="^page-[A-Za-z0-9_-]{16,64}$", include_in_schema=False)]


@dataclass(frozen=True)
class ItemRow:
    """A line of the ranking; `was` is the place before the last rating, None where it was not among the first."""

    title: str
    score: float
    was: int | None
    because: list[Reason]


def add_page(app: FastAPI, service: Service) -> None:
    """Adds the page's routes."""
    loader = jinja2.FileSystemLoader(_HERE / "templates")
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    engine = service.engine
    scale = engine.trained.fitted.scale
    choices = list(range(math.ceil(scale.low), math.floor(scale.high) + 1))
    places: dict[str, dict[str, int]] = {}

    def ranking(user: str) -> Any:
        def answer(person: Person) -> dict[str, Any]:
            served, ranked = engine.recommend(person, _SHOWN, explain=True)
            support = served.adapted.support
            titles = [engine.catalog.title(int(code)) for code in support.items]
            before = places.get(user) or {
                entry.item: place for place, (entry, _) in enumerate(engine.recommend(_nobody(), 100)[1], start=1)
            }
            rows = [ItemRow(entry.title, entry.score, before.get(entry.item), reasons) for entry, reasons in ranked]
            return {
                "adapter": served.facts(),
                "losses": list(served.losses),
                "rows": rows,
                "ratings": [
                    {"title": title, "value": float(value)} for title, value in zip(titles, support.values, strict=True)
                ],
            }

        return service.person(user, answer)

    def _nobody() -> Person:
        return Person(engine.stranger, 0, 0)

    async def found(user: str, q: str) -> dict[str, Any]:
        def answer(person: Person | None, _: object) -> dict[str, Any]:
            assert person is not None
            support = person.adapted.support
            ids = [engine.catalog.ids[code] for code in support.items]
            rated = dict(zip(ids, (float(value) for value in support.values), strict=True))
            if q.strip():
                return {"found": engine.search(q, _FOUND), "rated": rated}
            return {"found": [entry for entry, _ in engine.recommend(_nobody(), _FOUND)[1]], "rated": rated}

        hits: dict[str, Any] = await service.ask(Job(answer, user))
        return hits | {"choices": choices}

    def render(name: str, user: str | None, facts: dict[str, Any]) -> HTMLResponse:
        response = HTMLResponse(templates.get_template(name).render(**facts))
        if user is not None:
            response.set_cookie(_COOKIE, user, httponly=True, samesite="strict", max_age=30 * 86400)
        return response

    async def after_change(request: Request, user: str) -> Response:
        if request.headers.get("hx-request") != "true":
            return RedirectResponse("/", 303)
        return render("ranking.html", None, await ranking(user))

    @app.get("/", include_in_schema=False)
    async def page(visitor: Visitor = None, q: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
        user = visitor or f"page-{secrets.token_urlsafe(24)}"
        facts = {"q": q, **await ranking(user), **await found(user, q)}
        return render("page.html", user, facts)

    @app.get("/ui/find", include_in_schema=False)
    async def find(visitor: Visitor = None, q: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
        return render("found.html", None, await found(visitor or "page-nobody", q))

    @app.post("/ui/rate", include_in_schema=False)
    async def rate(request: Request, visitor: Visitor = None) -> Response:
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        user = _known(visitor)
        try:
            rating = float(form["rating"][0])
        except (KeyError, ValueError):
            raise ConfigError("the form has no rating", "Choose one of the numbers") from None
        before = await service.person(user, lambda person: engine.recommend(person, 100)[1])
        places[user] = {entry.item: place for place, (entry, _) in enumerate(before, start=1)}
        while len(places) > 1000:
            places.pop(next(iter(places)))
        await service.feedback(user, [(form.get("item", [""])[0], rating)], None)
        return await after_change(request, user)

    @app.post("/ui/forget", include_in_schema=False)
    async def forget(request: Request, visitor: Visitor = None) -> Response:
        user = _known(visitor)
        places.pop(user, None)
        await service.erase(user)
        return await after_change(request, user)

    @app.get("/ui/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _FILES:
            return Response(status_code=404)
        return FileResponse(_HERE / "static" / name, media_type=_FILES[name])


def _known(visitor: str | None) -> str:
    if visitor is None:
        raise ConfigError("the page needs its cookie", "Open / first, with cookies allowed")
    return visitor
