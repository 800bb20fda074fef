"""API keys do what they are for and no more, expire, are read again, and leave a log that names no user."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from metarec.errors import ConfigError
from metarec.serve import keys as keys_module
from metarec.serve.guard import Guard, JsonLines, RequestLimits
from metarec.serve.keys import ApiKey, KeyFile, new_key, read_keys, scope_of


def answer(limits: RequestLimits, method: str, path: str, key: str = "", user: str | None = None) -> int:
    """Sends a request through the guard, and returns the status of what comes back."""
    statuses: list[int] = []

    class Route:
        pass

    async def application(scope: Any, receive: Any, send: Any) -> None:
        scope["route"], scope["path_params"] = Route(), {} if user is None else {"user": user}
        Route.path = path.replace(user, "{user}") if user else path  # type: ignore[attr-defined]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers}
    guard = Guard(application, limits, lambda *_: None, lambda name: f"pseudonym of {len(name)}")
    asyncio.run(guard(scope, receive, send))
    return statuses[0]


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/v1/users/ann/recommendations", "read"),
        ("GET", "/v1/users/ann", "read"),
        ("POST", "/v1/users/ann/score", "read"),
        ("GET", "/v1/search", "read"),
        ("POST", "/v1/users/ann/feedback", "write"),
        ("POST", "/ui/rate", "write"),
        ("DELETE", "/v1/users/ann", "erase"),
        ("POST", "/ui/forget", "erase"),
        ("POST", "/v1/items", "admin"),
        ("DELETE", "/v1/items/m1", "admin"),
        ("GET", "/metrics", "admin"),
    ],
)
def test_a_key_does_what_it_is_for_and_nothing_else(method: str, path: str, scope: str) -> None:
    assert scope_of(method, path) == scope
    for given in ("read", "write", "erase", "admin"):
        secret, key = new_key("shop", [given])
        limits = RequestLimits(keys=lambda key=key: (key,))  # type: ignore[misc]
        assert answer(limits, method, path, secret) == (200 if given == scope else 403)


def test_a_key_is_compared_with_all_keys_in_constant_time_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, one), (last, two) = new_key("one"), new_key("two")
    compared: list[int] = []

    def compare(left: str, right: str) -> bool:
        compared.append(len(left))
        return left == right

    monkeypatch.setattr("metarec.serve.guard.hmac.compare_digest", compare)
    limits = RequestLimits(keys=lambda: (one, two))
    assert [answer(limits, "GET", "/version", key) for key in (first, last, "nobody's")] == [200, 200, 401]
    assert compared == [64] * 6


def test_a_key_that_has_expired_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, key = new_key("shop", days=1)
    limits = RequestLimits(keys=lambda: (key,))
    assert answer(limits, "GET", "/version", secret) == 200
    later = time.time() + 86401
    monkeypatch.setattr(keys_module.time, "time", lambda: later)
    assert answer(limits, "GET", "/version", secret) == 401


def test_a_key_file_holds_what_keys_may_do_and_until_when(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made = [new_key("all")[1], new_key("some", ["write", "read"], 30)[1]]
    file.write_text("# keys\n" + "".join(key.line for key in made) + f"old {'0' * 64}\n")
    every, some, old = read_keys(file)
    assert (every, some.scopes, old) == (made[0], ("read", "write"), ApiKey("old", "0" * 64))
    assert some.until == pytest.approx(made[1].until, abs=1)
    for line, problem in (
        ("a x", "is not 'NAME"),
        (f"a {'0' * 64} fly", "scope 'fly'"),
        (f"a {'0' * 64} read 2030-x", "no date"),
    ):
        file.write_text(line)
        with pytest.raises(ConfigError, match=problem):
            read_keys(file)
    with pytest.raises(ConfigError, match="no scope 'fly'"):
        new_key("shop", ["fly"])


def test_a_key_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_RELOAD_SECONDS", 0.0)
    file, (first, second) = tmp_path / "keys", (new_key("first")[1], new_key("second")[1])
    file.write_text(first.line)
    keys = KeyFile(file)
    assert keys() == (first,)
    for turn, (text, expected) in enumerate(((second.line, (second,)), ("rubbish", (second,)), (first.line, (first,)))):
        file.write_text(text)
        os.utime(file, ns=(turn, turn))
        assert keys() == expected
    file.unlink()
    assert keys() == (first,)


def test_the_audit_log_says_whose_key_changed_what_and_names_no_user(caplog: pytest.LogCaptureFixture) -> None:
    secret, key = new_key("shop")
    limits = RequestLimits(keys=lambda: (key,))
    with caplog.at_level(logging.INFO, "metarec.audit"):
        for method, path in (
            ("GET", "/v1/users/CANARY/recommendations"),
            ("POST", "/v1/users/CANARY/feedback"),
            ("DELETE", "/v1/users/CANARY"),
        ):
            answer(limits, method, path, secret, "CANARY")
        answer(limits, "POST", "/v1/items", secret)
    lines = [json.loads(JsonLines().format(r)) for r in caplog.records if r.name == "metarec.audit"]
    assert [(line["scope"], line["key"], line["status"]) for line in lines] == [
        ("write", "shop", 200),
        ("erase", "shop", 200),
        ("admin", "shop", 200),
    ]
    assert [line.get("subject") for line in lines] == ["pseudonym of 6", "pseudonym of 6", None]
    assert "CANARY" not in json.dumps(lines)
