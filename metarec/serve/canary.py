"""One address for two models: an application that passes each user's requests to the one that serves them.

Each model has an application of its own, with its engine, worker and store, as if they were two servers of one store.
What names no user is answered by the current model's. The deployment's file is read again when it changes: a candidate
is loaded beside what is served, and a promotion or a rollback takes effect between two requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from metarec.errors import ConfigError
from metarec.files.run_directory import DEPLOYMENT
from metarec.serve.deployment import DeployedRun, Deployment, models_name, read_deployment
from metarec.serve.service import Service

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 1.0
# How long a stop waits for requests to a model that was taken out of service before.
_CLOSE_SECONDS = 5.0
_VISITOR = "metarec_visitor"
# Of these a service has one number, whatever serves it; others of one name are added up.
_ONCE = ("metarec_items",)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(eq=False)
class _Served:
    """A model's application, and how many requests it is answering."""

    app: FastAPI
    lifespan: AbstractAsyncContextManager[Any]
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def service(self) -> Service:
        found: Service = self.app.state.service
        return found

    async def close(self) -> None:
        """Ends the application when the requests that it is answering are answered."""
        while self.running:
            self.idle.clear()
            await self.idle.wait()
        await self.lifespan.__aexit__(None, None, None)


class _Merged(Collector):
    """The metrics of several registries; what has the same name and labels is added up."""

    def __init__(self, registries: Iterable[CollectorRegistry], failures: Callable[[], int]) -> None:
        self._registries = list(registries)
        self._failures = failures

    def collect(self) -> Iterable[Metric]:
        found: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
        for registry in self._registries:
            for metric in registry.collect():
                _, values = found.setdefault(metric.name, (metric, {}))
                for sample in metric.samples:
                    key = (sample.name, tuple(sorted(sample.labels.items())))
                    once = metric.name in _ONCE or sample.name.endswith("_created")
                    values[key] = max(values.get(key, 0), sample.value) if once else values.get(key, 0) + sample.value
        for metric, values in found.values():
            merged = Metric(metric.name, metric.documentation, metric.type)
            for (name, labels), value in values.items():
                merged.add_sample(name, dict(labels), value)
            yield merged
        yield GaugeMetricFamily(
            "metarec_deployment_failed", "1 where the deployment could not be taken", self._failures()
        )


class Canary:
    """An ASGI application that serves a deployment.

    Args:
        folder: The deployment's directory.
        open_app: Makes the application of a run; called in another thread than requests are answered in.
    """

    def __init__(self, folder: Path, open_app: Callable[[Path], FastAPI]) -> None:
        self._folder = folder
        self._open = open_app
        self._failed = 0
        self._seen: tuple[int, int] | None = None
        self._apps: dict[str, FastAPI] = {}
        self._served: dict[str, _Served] = {}
        self._closing: set[asyncio.Task[None]] = set()
        # What cannot be served is an error before a port is opened.
        self._deployment = read_deployment(folder)
        for deployed in self._deployment.runs():
            deployed.check()
            self._apps[deployed.content] = open_app(Path(deployed.run))
        _refuse_same(self._apps.values())

    @property
    def deployment(self) -> Deployment:
        """What is served now."""
        return self._deployment

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Send) -> None:
        """Serves one connection."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        served = self._of(scope)
        served.running += 1
        try:
            if scope["type"] == "http" and scope["path"] == "/readyz" and not await self._others_ready(scope, send):
                return
            await served.app(scope, receive, send)
        finally:
            served.running -= 1
            if not served.running:
                served.idle.set()

    def _of(self, scope: Mapping[str, Any]) -> _Served:
        """Returns the application that answers a request."""
        current = self._served[self._deployment.current.content]
        candidate = self._deployment.candidate
        user = user_of(scope) if candidate is not None else None
        if candidate is None or user is None:
            return current
        chosen = self._deployment.in_canary(current.service.engine.store.pseudonym(user))
        return self._served[candidate.content] if chosen else current

    async def _others_ready(self, scope: dict[str, Any], send: Send) -> bool:
        """Says whether the candidate is ready; where it is not, its answer is sent."""
        candidate = self._deployment.candidate
        if candidate is None:
            return True
        messages: list[MutableMapping[str, Any]] = []
        asked = False

        async def keep(message: MutableMapping[str, Any]) -> None:
            messages.append(message)

        async def ask() -> dict[str, Any]:
            nonlocal asked
            if asked:  # who asks for both has not gone
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}

        await self._served[candidate.content].app(dict(scope), ask, keep)
        if messages and messages[0].get("status") == 200:
            return True
        for message in messages:
            await send(message)
        return False

    async def _live(self, receive: Callable[..., Any], send: Send) -> None:
        """Starts what is served, follows the deployment's file, and ends all of it."""
        await receive()
        try:
            await self._take(self._deployment)
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": type(error).__name__})
            raise
        following = asyncio.create_task(self._follow())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CLOSE_SECONDS)
        ending = [served.lifespan.__aexit__(None, None, None) for served in self._served.values()]
        self._served.clear()
        await asyncio.gather(*ending)
        await send({"type": "lifespan.shutdown.complete"})

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self.refresh()

    async def refresh(self) -> None:
        """Takes the deployment as its file says it is now; one that cannot be served changes nothing."""
        try:
            facts = (self._folder / DEPLOYMENT).stat()
            now = (facts.st_mtime_ns, facts.st_ino)
            if now == self._seen:
                return
            self._seen = now
            found = read_deployment(self._folder)
            if found != self._deployment:
                await self._take(found)
                _LOG.info("the deployment changed")
            self._failed = 0
        except Exception as error:  # whatever it is, what is served stays
            self._failed = 1
            _LOG.error("the deployment cannot be taken", extra={"failure": type(error).__name__})

    async def _take(self, deployment: Deployment) -> None:
        """Serves a deployment from now on."""
        for deployed in deployment.runs():
            if deployed.content not in self._served:
                self._served[deployed.content] = await self._start(deployed)
        _refuse_same(self._served[deployed.content].app for deployed in deployment.runs())
        self._note(deployment)
        self._deployment = deployment
        self._watch(deployment)
        for content in set(self._served) - {deployed.content for deployed in deployment.runs()}:
            closing = asyncio.create_task(self._served.pop(content).close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _note(self, deployment: Deployment) -> None:
        """Notes in the store which models a canary compares."""
        if deployment.candidate is None:
            return
        current, candidate = (self._served[deployed.content].service.engine for deployed in deployment.runs())
        digests = {"current": current.digest, "candidate": candidate.digest}
        current.store.set_fact(models_name(deployment.period), json.dumps(digests))

    async def _start(self, deployed: DeployedRun) -> _Served:
        app = self._apps.pop(deployed.content, None)
        if app is None:
            deployed.check()
            app = await asyncio.to_thread(self._open, Path(deployed.run))
        lifespan = app.router.lifespan_context(app)
        await lifespan.__aenter__()
        return _Served(app, lifespan)

    def _watch(self, deployment: Deployment) -> None:
        """Counts feedback for the canary from now on, and gives the current application everybody's metrics."""
        services = [self._served[deployed.content].service for deployed in deployment.runs()]
        for service in services:
            service.worker.watch.wanted = deployment.period
        registries = [service.own_registry for service in services]
        services[0].registry = CollectorRegistry()
        services[0].registry.register(_Merged(registries, lambda: self._failed))


def _refuse_same(apps: Iterable[FastAPI]) -> None:
    """Refuses two runs that learned the same: their users' adapters have one name, and nothing is to be compared."""
    digests = [app.state.service.engine.digest for app in apps]
    if len(set(digests)) < len(digests):
        raise ConfigError("the candidate has the current run's meta-parameters", "Name a run that was trained since")


def user_of(scope: Mapping[str, Any]) -> str | None:
    """Returns the user that a request is for, by its path, query or the page's cookie; None where it names nobody."""
    if scope["type"] != "http":
        return None
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    parts = raw.partition(b"?")[0].split(b"/")
    if len(parts) > 3 and parts[1:3] == [b"v1", b"users"]:
        return unquote_to_bytes(parts[3]).decode("utf-8", "replace")
    if parts[1:3] == [b"v1", b"search"]:
        named = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("user")
        return named[0] if named else None
    cookies: SimpleCookie = SimpleCookie()
    for name, value in scope.get("headers", ()):
        if name == b"cookie":
            with suppress(CookieError):
                cookies.load(value.decode("latin-1"))
    return cookies[_VISITOR].value if _VISITOR in cookies else None
