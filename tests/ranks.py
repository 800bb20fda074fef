"""Processes that train together, started from a test as torchrun starts them, and what became of each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

from metarec.meta.distributed import launched

# Forked from a process that has imported what they need, and nothing else.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["metarec.recommender", "torch._dynamo"])
_SECONDS = 120


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns what ``work(ranks, *arguments)`` returned or raised on each rank; None where the process was killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(size):
        receive, send = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(rank, size, store.port, send, work, arguments))
        process.start()
        send.close()
        started.append((process, receive))
    try:
        return [_outcome(receive) for _, receive in started]
    finally:
        for process, _ in started:
            process.join(_SECONDS)
            process.kill()


def _outcome(receive: Connection) -> Any:
    assert receive.poll(_SECONDS), "a process hangs"
    try:
        return receive.recv()
    except EOFError:
        return None


def _run(
    rank: int, size: int, port: int, send: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        with launched() as ranks:
            found = work(ranks, *arguments)
    except BaseException as error:
        found = error
    send.send(found)
