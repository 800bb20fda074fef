"""The client of the service: how requests are sent, again where that is safe, and answers are read."""

from __future__ import annotations

import json
import time
import types
import typing
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from metarec.client.answers import (
    Added,
    Erased,
    FeedbackAnswer,
    InformativeItems,
    Preferences,
    Rating,
    Recommendations,
    Removed,
    ScoresAnswer,
    SearchAnswer,
    UserAnswer,
)
from metarec.errors import MetarecError

_Answer = TypeVar("_Answer")
# The service is busy, or its store does not answer for the moment.
_AGAIN = (429, 503)
_LONGEST_WAIT = 30.0


class ServiceError(MetarecError):
    """The service refused a request, failed, or was not reached.

    Args:
        problem: What the service says is wrong.
        cure: What it says to do about it.
        status: The HTTP status; 0 where no answer came.
    """

    def __init__(self, problem: str, cure: str = "", status: int = 0) -> None:
        self.status = status
        super().__init__(problem, cure)


class Client:
    """Asks a service. Safe to share between threads: it holds no connection.

    Args:
        address: Where the service is, e.g. ``http://127.0.0.1:8000``.
        key: An API key, see ``metarec api-key``.
        timeout: Seconds to wait for an answer.
        retries: How often a request is sent again that the service was too busy for, or that met a broken connection;
            `rate` sends a key with its ratings, so that they count once.
    """

    def __init__(self, address: str, key: str | None = None, *, timeout: float = 60.0, retries: int = 3) -> None:
        if not address.startswith(("http://", "https://")):
            raise ServiceError(f"the address '{address}' does not begin with http:// or https://", "Write it in full")
        self.address = address.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self._headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def rate(
        self,
        user: str,
        ratings: Mapping[str, float | str] | Iterable[Rating | tuple[str, float | str]] = (),
        *,
        about: str | Mapping[str, str | float] | None = None,
        friends: Sequence[str] | None = None,
        idempotency_key: str | None = None,
    ) -> FeedbackAnswer:
        """Sends ratings, and what is known of a user; when it returns, they are durable and the adapter uses them.

        Args:
            user: The user's id.
            ratings: Ids of items and ratings, or reviews without one; or `Rating`s with their moments and reviews; at
                most 100.
            about: A sentence about the user, or fields of users to their values.
            friends: Ids of friends.
            idempotency_key: A second request with the same key changes nothing; None makes one.

        Raises:
            ServiceError: An item is unknown, a rating is off the scale, or the service did not answer.
        """
        given = ratings.items() if isinstance(ratings, Mapping) else ratings
        sent = [_without_empty(asdict(one if isinstance(one, Rating) else _rating(*one))) for one in given]
        body = _known(about, friends) | ({"ratings": sent} if sent else {})
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        path = "/v1/users/{user}/feedback"
        return self._ask(FeedbackAnswer, "POST", path, {"user": user}, body=body, headers=headers)

    def recommendations(
        self,
        user: str,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        explain: bool = False,
        diversity: float = 0.0,
        where: str | None = None,
        block: Sequence[str] = (),
        context: Mapping[str, str | float] | None = None,
        about: str | Mapping[str, str | float] | None = None,
        friends: Sequence[str] = (),
    ) -> Recommendations:
        """Returns the best `k` items of the catalog for a user; see the service's route for the arguments."""
        query = {
            "k": k,
            "exclude_seen": exclude_seen,
            "explain": explain,
            "diversity": diversity,
            "where": where,
            "block": list(block),
            **_moment(context, about, friends),
        }
        return self._ask(Recommendations, "GET", "/v1/users/{user}/recommendations", {"user": user}, query)

    def score(
        self,
        user: str,
        items: Sequence[str],
        *,
        context: Mapping[str, str | float] | None = None,
        about: str | Mapping[str, str | float] | None = None,
        friends: Sequence[str] | None = None,
    ) -> ScoresAnswer:
        """Returns the scores of some items for a user."""
        body = {"items": list(items), **_known(about, friends), **({"context": dict(context)} if context else {})}
        return self._ask(ScoresAnswer, "POST", "/v1/users/{user}/score", {"user": user}, body=body)

    def preferences(self, user: str) -> Preferences:
        """Returns how much more a user is believed to like each category than others do, and how surely."""
        return self._ask(Preferences, "GET", "/v1/users/{user}/preferences", {"user": user})

    def informative(self, user: str, k: int = 10, *, exclude: Sequence[str] = ()) -> InformativeItems:
        """Returns the items whose ratings would tell most about a user: what to ask a new one first.

        Args:
            user: The user's id.
            k: How many items.
            exclude: Ids of items that the user cannot rate.
        """
        query = {"k": k, "exclude": list(exclude)}
        return self._ask(InformativeItems, "GET", "/v1/users/{user}/informative", {"user": user}, query)

    def export(self, user: str, *, after: int = 0, limit: int = 1000) -> UserAnswer:
        """Returns what is stored about a user; where its `next` is not None, ask again with it as `after`.

        Raises:
            ServiceError: There is no such user.
        """
        query = {"after": after, "limit": limit}
        return self._ask(UserAnswer, "GET", "/v1/users/{user}", {"user": user}, query)

    def erase(self, user: str) -> Erased:
        """Erases a user.

        Raises:
            ServiceError: There is no such user.
        """
        return self._ask(Erased, "DELETE", "/v1/users/{user}", {"user": user})

    def add_items(self, items: Mapping[str, Mapping[str, str]]) -> Added:
        """Adds items to the catalog.

        Args:
            items: Ids to fields; ``title`` is needed.
        """
        body = {"items": [{"id": item, "fields": dict(values)} for item, values in items.items()]}
        return self._ask(Added, "POST", "/v1/items", body=body)

    def remove_item(self, item: str) -> Removed:
        """Takes an item out of every ranking and search for good."""
        return self._ask(Removed, "DELETE", "/v1/items/{item}", {"item": item})

    def search(
        self,
        q: str,
        k: int = 10,
        *,
        user: str | None = None,
        context: Mapping[str, str | float] | None = None,
        about: str | Mapping[str, str | float] | None = None,
        friends: Sequence[str] = (),
    ) -> SearchAnswer:
        """Returns items found by words and by meaning; with a user, in the order of their scores as well."""
        query = {"q": q, "k": k, "user": user, **_moment(context, about, friends)}
        return self._ask(SearchAnswer, "GET", "/v1/search", query=query)

    def health(self) -> dict[str, str]:
        """Returns ``{"status": "ok"}`` where the process runs."""
        return self._ask(dict[str, str], "GET", "/healthz")

    def ready(self) -> dict[str, Any]:
        """Says that the service answers requests now.

        Raises:
            ServiceError: It does not.
        """
        return self._ask(dict[str, Any], "GET", "/readyz")

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        """Waits until the service answers requests.

        Raises:
            ServiceError: It does not within so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not self._is_ready(last=time.monotonic() > deadline):
            time.sleep(0.1)

    def _is_ready(self, last: bool) -> bool:
        try:
            self.ready()
        except ServiceError:
            if last:
                raise
            return False
        return True

    def version(self) -> dict[str, str]:
        """Returns the versions of metarec, the API, the recommender, its language model and its task."""
        return self._ask(dict[str, str], "GET", "/version")

    def metrics(self) -> str:
        """Returns the service's metrics in Prometheus' format."""
        return self._send("GET", "/metrics", None, {})

    def _ask(
        self,
        answer: type[_Answer],
        method: str,
        path: str,
        names: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Answer:
        """Sends a request, and returns its answer as a dataclass."""
        if empty := [name for name, value in (names or {}).items() if not value]:
            raise ServiceError(f"the id of the {empty[0]} is empty", "Give one of at least a character")
        filled = path.format(**{name: quote(value, safe="") for name, value in (names or {}).items()})
        given = {name: _in_address(value) for name, value in (query or {}).items() if value not in (None, [])}
        address = f"{filled}?{urlencode(given, doseq=True)}" if given else filled
        text = self._send(method, address, None if body is None else json.dumps(body).encode(), headers or {})
        found: _Answer = _read(answer, json.loads(text))
        return found

    def _send(self, method: str, address: str, body: bytes | None, headers: Mapping[str, str]) -> str:
        """Sends a request, again where that changes nothing but the answer, and returns the answer's text."""
        kind = {} if body is None else {"Content-Type": "application/json"}
        request = Request(  # noqa: S310 - the address begins with http
            f"{self.address}{address}", body, {**self._headers, **kind, **headers}, method=method
        )
        sent_twice_counts_once = method == "GET" or "Idempotency-Key" in headers
        for left in reversed(range(self.retries + 1)):
            found = self._try(request, left > 0, sent_twice_counts_once)
            if isinstance(found, str):
                return found
            time.sleep(found)
        raise AssertionError

    def _try(self, request: Request, again: bool, counts_once: bool) -> str | float:
        """Sends a request once, and returns the answer's text, or the seconds to wait until it is sent again."""
        try:
            with urlopen(request, timeout=self.timeout) as answer:  # noqa: S310
                text: str = answer.read().decode()
                return text
        except HTTPError as error:
            if error.code not in _AGAIN or not again:
                raise _refusal(error) from None
            return min(float(error.headers.get("Retry-After") or 1), _LONGEST_WAIT)
        except (URLError, HTTPException, OSError) as error:
            if not counts_once or not again:
                reason = getattr(error, "reason", error)
                raise ServiceError(
                    f"'{self.address}' does not answer: {reason}", "Is 'metarec serve' running there?"
                ) from None
            return 0.1


def _refusal(error: HTTPError) -> ServiceError:
    """Returns the service's own words, or the status where something else answered."""
    try:
        said = json.loads(error.read())["error"]
        return ServiceError(said["message"], said["cure"], error.code)
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"status {error.code}: {error.reason}", "Does the address lead to the service?", error.code)


def _rating(item: str, given: float | str) -> Rating:
    return Rating(item, review=given) if isinstance(given, str) else Rating(item, given)


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "", {})}


def _known(about: str | Mapping[str, str | float] | None, friends: Sequence[str] | None) -> dict[str, Any]:
    """Returns what is said of a user, as a body has it."""
    said = {} if about is None else {"about": about if isinstance(about, str) else dict(about)}
    return said | ({} if friends is None else {"friends": list(friends)})


def _moment(
    context: Mapping[str, str | float] | None,
    about: str | Mapping[str, str | float] | None,
    friends: Sequence[str],
) -> dict[str, Any]:
    """Returns what one question says of the user and the moment, as an address has it."""
    facts = [about] if isinstance(about, str) else [f"{name}={value}" for name, value in (about or {}).items()]
    moment = [f"{name}={value}" for name, value in (context or {}).items()]
    return {"context": moment, "about": facts, "friend": list(friends)}


def _in_address(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _read(kind: Any, value: Any) -> Any:
    """Returns a JSON value as what a dataclass says it is; keys that it does not know are left out."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(
            **{name.name: _read(hints[name.name], value[name.name]) for name in fields(kind) if name.name in value}
        )
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(next(part for part in inner if part is not type(None)), value)
    if origin is tuple:
        return tuple(_read(inner[0], entry) for entry in value)
    return value
