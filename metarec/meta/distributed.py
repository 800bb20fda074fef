"""Processes that train together: each takes its share of every step's users, and all hold the same meta-state.

``torchrun`` and ``accelerate launch`` start such processes, the *ranks*. Nothing but sums and copies passes between
them: the meta-gradient and the scores of validation users are summed, rank 0's meta-state and decisions are copied.
Only rank 0 writes files and prints. Numbers on a GPU travel by NCCL; all others, and the question whether everybody
is still there, by Gloo, which notices a process that ends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metarec.errors import ConfigError, MetarecError, RankError, TrainingError
from metarec.meta.algorithms import MetaGradient
from metarec.meta.inner_loop import MetaState
from metarec.system.devices import check_device
from metarec.system.progress import quiet

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_FAILURE = "failure"
# So long a rank waits for the others: one of them may have a whole catalog to read, or a big stack to fit.
_PATIENCE = timedelta(days=1)
_Thing = TypeVar("_Thing")


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them; by default it is alone, and nothing is sent.

    Args:
        rank: This process's number, from 0.
        size: How many there are.
        store: Where they leave word for each other; None where it is alone.
        gpus: The group that sums and copies on GPUs; None does so in main memory.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    gpus: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """Where the tensors are that are sent."""
        return "cpu" if self.gpus is None else "cuda"

    def share(self, things: Sequence[_Thing]) -> Sequence[_Thing]:
        """Returns this rank's share: every `size`-th thing. Shares differ by one at most, and may be empty."""
        return things[self.rank :: self.size]

    def sum(self, vector: Tensor) -> Tensor:
        """Returns the sum of all ranks' vectors, in double precision where there are several.

        Args:
            vector: Of the same length on every rank.

        Raises:
            RankError: Another rank failed.
            TrainingError: Another rank ended without a word.
        """
        if self.size == 1:
            return vector
        total = vector.to(self.device).to(torch.float64, copy=True)
        with self._together():
            dist.all_reduce(total, group=self.gpus)
        return total

    def collect(self, own: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Returns the vectors of all things, of which every rank has those of its share.

        Args:
            own: This rank's vectors, in the order of `share`.
            lengths: The length of every vector, over all ranks.

        Raises:
            RankError: Another rank failed.
            TrainingError: Another rank ended without a word.
        """
        if self.size == 1:
            return list(own)
        parts = [torch.zeros(length, dtype=torch.float64) for length in lengths]
        for part, vector in zip(self.share(parts), own, strict=True):
            part.copy_(vector)
        return list(self.sum(torch.cat(parts)).cpu().split(list(lengths)))

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors by those of rank 0, bit for bit.

        Raises:
            RankError: Another rank failed.
            TrainingError: Another rank ended without a word.
        """
        if self.size == 1:
            return
        targets = list(tensors)
        sent = torch.cat([_as_bytes(tensor).to(self.device) for tensor in targets])
        with self._together():
            dist.broadcast(sent, src=0, group=self.gpus)
        for target, part in zip(targets, sent.split([target.nbytes for target in targets]), strict=True):
            target.copy_(part.clone().view(target.dtype).view(target.shape))

    def first_text(self, text: str) -> str:
        """Returns rank 0's text.

        Raises:
            RankError: Another rank failed.
            TrainingError: Another rank ended without a word.
        """
        if self.size == 1:
            return text
        sent = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(sent)])
        self.copy_first([length])
        if not self.leads:
            sent = torch.zeros(int(length), dtype=torch.uint8)
        self.copy_first([sent])
        return bytes(sent.tolist()).decode()

    def any(self, said: bool) -> bool:
        """Says whether any rank says so.

        Raises:
            RankError: Another rank failed.
            TrainingError: Another rank ended without a word.
        """
        return bool(self.sum(torch.tensor([float(said)])).item())

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Runs what takes all ranks, and says why one of them is missing."""
        try:
            if self.gpus is not None:
                dist.barrier()  # NCCL would wait for a rank that has ended
            yield
        except RuntimeError as error:
            raise self._missing(error) from error

    def _missing(self, error: RuntimeError) -> MetarecError:
        """Returns what is said where another rank has ended: its own error, if it left word."""
        with suppress(RuntimeError):  # the store may be the process's that has ended
            if self.store is not None and self.store.check([_FAILURE]):
                return RankError(self.store.get(_FAILURE).decode())
        # Gloo says so amid much else.
        lost = re.search(r"Connection \w+ by peer|Broken pipe", str(error))
        return TrainingError(
            f"another process of this training has ended: {lost[0] if lost else str(error).splitlines()[0]}",
            "See what it said, and start all of them again; with --resume they go on from the last checkpoint",
        )


ALONE = Ranks()


def started_together() -> int:
    """Returns how many processes ``torchrun`` or ``accelerate launch`` started; 1 without them."""
    return int(os.environ["WORLD_SIZE"]) if set(os.environ) >= _VARIABLES else 1


@contextmanager
def launched(device: str = "cpu") -> Iterator[Ranks]:
    """Yields the ranks that ``torchrun`` or ``accelerate launch`` started; without one, this process alone.

    The first error of a rank ends the others. Ranks other than 0 show no progress and log errors alone.

    Args:
        device: Where the ranks compute. On ``cuda`` each takes the GPU of its number on its machine.

    Raises:
        ConfigError: Processes and GPUs do not fit together.
        RankError: Another rank failed; in this process all was well, or the same error came later.
    """
    if started_together() == 1:
        yield ALONE
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    words = PrefixStore("metarec", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        with _first_error_counts(words, rank), quiet(rank > 0):
            yield Ranks(rank, size, words, _gpus(device))
    finally:
        dist.destroy_process_group()


def _gpus(device: str) -> dist.ProcessGroup | None:
    """Gives this process its GPU, and returns the group that sums on all of them; None for other devices."""
    check_device(device)
    if not device.startswith("cuda"):
        return None
    here, local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if here > 1 and device != "cuda":
        raise ConfigError(f"{here} processes on this machine would share '{device}'", "Say --device cuda")
    if here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes were started here, and this machine has {torch.cuda.device_count()} GPUs",
            "Start one for each: torchrun --nproc-per-node gpu",
        )
    torch.cuda.set_device(local if device == "cuda" else device)
    return dist.new_group(backend="nccl", timeout=_PATIENCE) if dist.is_nccl_available() else None


@contextmanager
def _first_error_counts(store: Store, rank: int) -> Iterator[None]:
    """Leaves word of this rank's error for the others; one that comes after another rank's is a `RankError`."""
    try:
        yield
    except RankError:
        raise
    except BaseException as error:
        own = f"process {rank} ended the training: {str(error) or type(error).__name__}"
        first = own
        with suppress(RuntimeError):  # the store may be a process's that has ended
            first = store.compare_set(_FAILURE, "", own).decode()
        if first != own and isinstance(error, MetarecError):
            raise RankError(first) from error
        raise


def mean_over_ranks(own: MetaGradient | None, meta: MetaState, users: int, ranks: Ranks) -> MetaGradient:
    """Returns the meta-gradient of all users of a step from those of every rank's share of them.

    It equals that of one process up to rounding, for algorithms whose gradient is a mean over users.

    Args:
        own: That of this rank's share; None where the share is empty.
        meta: The meta-parameters, the same on every rank.
        users: The number of users of the step, over all ranks.
        ranks: The processes.

    Raises:
        RankError: Another rank failed.
        TrainingError: Another rank ended without a word.
    """
    if ranks.size == 1:
        assert own is not None
        return own
    tensors = meta.tensors()
    losses, diverged = (torch.zeros(users, dtype=torch.float64) for _ in range(2))
    sums = [torch.zeros(value.numel(), dtype=torch.float64) for value in tensors.values()]
    if own is not None:
        losses[ranks.rank :: ranks.size] = own.loss.cpu().double()
        diverged[ranks.rank :: ranks.size] = own.diverged.cpu().double()
        kept = int((~own.diverged).sum())
        sums = [own.gradients[name].reshape(-1).to(ranks.device).double() * kept for name in tensors]
    parts = [part.to(ranks.device) for part in (*sums, losses, diverged)]
    *sums, losses, diverged = ranks.sum(torch.cat(parts)).split([len(part) for part in parts])
    count = max(users - int(diverged.sum()), 1)
    means = {
        name: (total / count).view(value.shape).to(value.dtype).to(value.device)
        for (name, value), total in zip(tensors.items(), sums, strict=True)
    }
    return MetaGradient(losses.cpu(), means, diverged.cpu() > 0)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
