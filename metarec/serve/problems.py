"""What is wrong with a request, and how to cure it: the schema of errors, and the words of those of validation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from metarec.errors import ConfigError, suggest


class ErrorBody(BaseModel):
    """An error: what is wrong, and how to cure it."""

    status: int
    message: str
    cure: str


class Problem(BaseModel):
    """The answer to a request that failed."""

    error: ErrorBody


_JSON_TYPES = {
    dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"
}  # fmt: skip


def faults(errors: Sequence[Any]) -> tuple[str, str]:
    """Says what is wrong with a request, and how to cure it, without the values: they are private.

    Args:
        errors: What `fastapi.exceptions.RequestValidationError.errors` returns; the first five are described.

    Returns:
        The message and the cure, each with the field and in the errors' order.
    """
    described = [_fault(error) for error in errors[:5]]
    cures = [cure if len(described) == 1 else f"{field}: {cure}" for field, _, cure in described]
    return "; ".join(f"{field} {problem}" for field, problem, _ in described), "; ".join(cures)


def _fault(error: Any) -> tuple[str, str, str]:
    """Returns the field of an error, its problem and its cure."""
    kind, message = str(error["type"]), str(error["msg"]).removeprefix("Value error, ")
    place, *path = (str(part)[:80] for part in error["loc"])
    if kind == "json_invalid":
        return "the body", f"is not JSON at character {path[0]}", "Send JSON"
    path = path[1:] if path[:1] in (["one"], ["several"], ["known"]) else path
    field = f"'{'.'.join(path)}' of the {place}" if path else f"the {place}"
    if kind == "missing":
        return field, "is missing", "Add it"
    if kind == "extra_forbidden":
        return field, "is unknown", "Leave it out; /openapi.json names every key"
    if place == "body":
        given = error["input"]
        if isinstance(given, bytes):
            return field, "is not read as JSON", "Send JSON with the header Content-Type: application/json"
        found = "null" if given is None else _JSON_TYPES.get(type(given), "something else")
        problem = f"is {found}" if kind.endswith(("_type", "_parsing")) else f"is {found} that is not taken"
    else:
        problem = "is not taken"
    return field, problem, re.sub(r"^(Input|String|List|\w+) should", "It should", message)


async def refuse_unknown_query(request: Request) -> None:
    """Refuses a parameter of the query that its route does not have: a misspelt one would change nothing, unseen.

    Raises:
        ConfigError: There is one.
    """
    paths, route = request.app.openapi()["paths"], request.scope["route"]
    operation = paths.get(route.path, {}).get(request.method.lower())
    # Pages may be linked to, and a process be asked how it is, with anything behind the address.
    if operation is None or not route.path.startswith("/v1/"):
        return
    known = [entry["name"] for entry in operation.get("parameters", ()) if entry["in"] == "query"]
    for name in request.query_params:
        if name not in known:
            cure = suggest(name, known) if known else "This route has no query"
            raise ConfigError(f"'{name[:80]}' of the query is unknown", cure)


_WHEN = {
    400: "a body that is not JSON, or a path that is not UTF-8",
    401: "no API key",
    403: "from another site, or not from this machine",
    404: "unknown user or item, or no such route",
    409: "contradicts what is there",
    413: "body too large",
    422: "not understood",
    429: "too often, or the queue is full: see Retry-After",
    503: "the store does not answer, or not in time",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text} for status, text in _WHEN.items()
}
