"""Checks requests and logs them: API keys, origin, rate and size, in an ASGI middleware around the application.

The log holds neither user ids nor titles.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from metarec.files.artifacts import parse_json
from metarec.serve.fair_queue import CLIENT
from metarec.serve.keys import ApiKey, scope_of

_LOG = logging.getLogger("metarec.serve")
_AUDIT = logging.getLogger("metarec.audit")
_OPEN = ("/healthz", "/readyz")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_BODY_SECONDS = 10.0
# Facts that a log line may carry; all others are dropped.
_FACTS = ("method", "route", "status", "ms", "request", "key", "scope", "subject", "failure", "count")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    # With `no-referrer` a form without scripts sends `Origin: null`, as another site's form does.
    (b"referrer-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
)

Messages = Callable[..., Any]


class Refusal(NamedTuple):
    """An answer that the application does not see; `retry_after` in seconds, 0 says nothing of when."""

    status: int
    message: str
    cure: str
    retry_after: int = 0


def is_loopback(host: str) -> bool:
    """Says whether an address can be reached from this machine alone."""
    return host in _LOOPBACK or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


@dataclass(frozen=True)
class RequestLimits:
    """Limits for one client.

    Args:
        keys: Returns the keys to accept; where there is none, requests from this machine are served, and no others.
        rate: Requests a second for each key, in the long run; 0 sets no limit.
        burst: Requests that one key may send at once.
        body: Bytes of a request's body.
    """

    keys: Callable[[], tuple[ApiKey, ...]] = tuple
    rate: float = 0.0
    burst: int = 100
    body: int = 1 << 20


@dataclass
class _Bucket:
    tokens: float
    at: float


@dataclass
class Guard:
    """Checks every request before the application sees it, and writes one log line after.

    Args:
        app: The application.
        limits: See `RequestLimits`.
        observe: Called after every answer with method, route, status and seconds.
        pseudonym: Returns what stands for a user in the audit log; None leaves them out.
    """

    app: Messages
    limits: RequestLimits
    observe: Callable[[str, str, int, float], None]
    pseudonym: Callable[[str], str] | None = None
    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    async def __call__(self, scope: dict[str, Any], receive: Messages, send: Messages) -> None:
        """Serves one connection; all but HTTP passes unchanged."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, key, finished = time.perf_counter(), 0, "", False

        async def answer(message: dict[str, Any]) -> None:
            nonlocal status, finished
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            key, refusal = self._check(scope["path"], headers, scope["method"])
            if refusal is None:
                refusal = _keep_escapes(scope)
            if refusal is None:
                body, refusal = await self._body(headers, receive)
            if refusal is None and body and _repeats_a_key(body):
                refusal = Refusal(422, "the body repeats a key", "Say it once")
            if refusal is not None:
                await _refuse(answer, refusal)
                return
            CLIENT.set(key)
            await self._serve(scope, body, receive, answer, lambda: finished)
        except asyncio.CancelledError:  # the service stops, and this took too long to wait for
            if status:
                raise
            await _refuse(answer, Refusal(503, "the service is stopping", "Ask again in 5 s", 5))
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.perf_counter() - began
            self.observe(scope["method"], route, status, seconds)
            facts = {"method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 1)}
            _LOG.info("request", extra={**facts, "key": key})
            self._audit(scope, facts, key)

    async def _serve(
        self, scope: dict[str, Any], body: bytes, receive: Messages, send: Messages, finished: Callable[[], bool]
    ) -> None:
        """Calls the application, and ends it where the client goes before the answer is complete."""
        gone = asyncio.ensure_future(_disconnect(receive))
        work = asyncio.ensure_future(self.app(scope, _replay(body, gone), send))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not finished():
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
            else:
                await work
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)

    def _audit(self, scope: dict[str, Any], facts: Mapping[str, object], key: str) -> None:
        """Notes what was changed, by whose key and of whom, without the user's id."""
        needed = scope_of(scope["method"], scope["path"])
        if needed == "read" or facts["route"] == "unmatched":
            return
        user = scope.get("path_params", {}).get("user")
        subject = "" if user is None or self.pseudonym is None else self.pseudonym(unquote(user))
        _AUDIT.info("audit", extra={**facts, "key": key, "scope": needed, "subject": subject})

    def _check(self, path: str, headers: Mapping[str, str], method: str) -> tuple[str, Refusal | None]:
        if path in _OPEN:
            return "", None
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and method not in ("GET", "HEAD") and origin.partition("://")[2] != host:
            return "", Refusal(403, "another site's page may not ask", "Ask from the service's own address")
        keys = self.limits.keys()
        if not keys:
            # A name that resolves to this machine would let a web page in through the user's browser.
            if not is_loopback(re.sub(r":\d+$", "", host)):
                message = "without API keys only this machine is served, by the name localhost"
                return "", Refusal(403, message, "Ask for localhost, or give the service --api-key-file")
            return "", self._take("")
        given = self._who(headers, keys)
        if given is None:
            message = "an API key is needed: Authorization: Bearer KEY"
            return "", Refusal(401, message, "Send a key that is in the service's file and has not expired")
        if (needed := scope_of(method, path)) not in given.scopes:
            message = f"this key may not do that: it lacks the scope '{needed}'"
            return given.name, Refusal(403, message, f"Make one that may: metarec api-key FILE --scope {needed}")
        return given.name, self._take(given.name)

    def _who(self, headers: Mapping[str, str], keys: Sequence[ApiKey]) -> ApiKey | None:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if scheme.lower() == "basic":  # sent by a browser for the page: any name, the key as password
            try:
                given = base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        digest = hashlib.sha256(given.encode()).hexdigest()
        # Every key is compared in constant time, so that timing does not tell which one matches.
        found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
        return found[0] if found and not found[0].expired else None

    def _take(self, name: str) -> Refusal | None:
        if not self.limits.rate:
            return None
        now = time.monotonic()
        bucket = self._buckets.setdefault(name, _Bucket(self.limits.burst, now))
        bucket.tokens = min(self.limits.burst, bucket.tokens + (now - bucket.at) * self.limits.rate)
        bucket.at = now
        if bucket.tokens < 1:
            seconds = max(1, math.ceil((1 - bucket.tokens) / self.limits.rate))
            return Refusal(429, "this key asks too often", f"Ask again in {seconds} s", seconds)
        bucket.tokens -= 1
        return None

    async def _body(self, headers: Mapping[str, str], receive: Messages) -> tuple[bytes, Refusal | None]:
        too_large = Refusal(413, f"the body is larger than {self.limits.body} bytes", "Send less at once")
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared[:20]) > self.limits.body:
            return b"", too_large
        parts, size, more = [], 0, True
        deadline = time.monotonic() + _BODY_SECONDS
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                return b"", Refusal(408, "the body did not arrive in time", "Send it within ten seconds")
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self.limits.body:
                return b"", too_large
        return b"".join(parts), None


def _keep_escapes(scope: dict[str, Any]) -> Refusal | None:
    """Decodes the path but for slashes and percent signs inside its parts, which `schema.UserId` decodes.

    A server decodes the whole path: a slash inside a user's id would divide it, and ids that are not UTF-8 would all be
    the same user.

    Returns:
        A refusal where the path is not UTF-8.
    """
    raw = scope.get("raw_path")
    if raw is None:
        return None
    kept = re.sub(rb"%(2[Ff]|25)", rb"%25\1", raw)
    try:
        scope["path"] = unquote_to_bytes(kept).decode("utf-8")
    except UnicodeDecodeError:
        return Refusal(400, "the path is not UTF-8", "Encode it as UTF-8, then percent-encode it")
    return None


async def _disconnect(receive: Messages) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, gone: asyncio.Future[None]) -> Messages:
    sent = False

    async def again() -> Any:
        nonlocal sent
        if sent:
            await asyncio.shield(gone)
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _repeats_a_key(body: bytes) -> bool:
    """Says whether a JSON body gives a key twice, which readers of JSON understand in different ways."""
    try:
        parse_json(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return str(error) == "repeats a key"
    return False


async def _refuse(send: Messages, refusal: Refusal) -> None:
    status = refusal.status
    body = json.dumps(error_body(status, refusal.message, refusal.cure)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.retry_after:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer, Basic realm="metarec", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str, cure: str) -> dict[str, Any]:
    """Returns the JSON of every error answer."""
    return {"error": {"status": status, "message": message, "cure": cure}}


class JsonLines(logging.Formatter):
    """Formats log records as JSON lines; of an exception only type and place, as its message may quote values."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"at": at, "level": record.levelname.lower(), "logger": record.name}
        line["event"] = record.getMessage().splitlines()[0] if record.getMessage() else ""
        line |= {name: getattr(record, name) for name in _FACTS if getattr(record, name, "") != ""}
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            line["failure"] = record.exc_info[0].__name__
            line["where"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-5:]]
        return json.dumps(line, ensure_ascii=False)
