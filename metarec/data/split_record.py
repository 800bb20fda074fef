"""`SplitRecord`: which data a recommender was fitted on and which users it saw, without their ids."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from metarec.data.interactions import Catalog, Codes, Flags, SplitPart
from metarec.errors import ConfigError, DataError, shown

if TYPE_CHECKING:
    from metarec.data.task_data import TaskData

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitRecord:
    """What a fitted recommender keeps of its data and split, so that nobody is tested whom it was fitted on.

    A user is kept as 64 bits of a digest salted with the data's hash: with a user's id one can check whether they were
    there, ids cannot be read off, and two recommenders fitted on different data share no digest.

    Args:
        hashes: Names of the data and the split by their content.
        train: Digests of the meta-training users, ascending.
        validation: Digests of the validation users, ascending.
    """

    hashes: Mapping[str, str]
    train: Codes
    validation: Codes

    @classmethod
    def of(cls, data: TaskData) -> SplitRecord:
        """Returns the record of a task's data as they are split now."""
        hashes = {name: data.hashes[name] for name in ("data", "split")}
        users = data.interactions.users

        def digests(part: SplitPart) -> Codes:
            return np.sort(_digests(hashes["data"], (users[code] for code in data.parts[part])))

        return cls(hashes, digests("train"), digests("validation"))

    def saw(self, users: Iterable[str]) -> Flags:
        """Says of each of some users whether meta-training or validation saw them, shape (users,)."""
        digests = _digests(self.hashes["data"], users)
        found: Flags = np.isin(digests, self.validation) | np.isin(digests, self.train)
        return found

    def without_seen(self, data: TaskData) -> TaskData:
        """Returns a task's data with test users that neither meta-training nor validation saw.

        The same data and split stay as they are. Of the same data split in another way, the test users that were seen
        are left out. Of other data, say of a file that grew, every user is tested who was not seen: the test users of
        before and those that are new.

        Raises:
            ConfigError: The data changed, and the task tests users that were meta-trained on, by its own rules.
            DataError: No user is left to test.
        """
        split, users = data.task.split, data.interactions.users
        if all(data.hashes[name] == known for name, known in self.hashes.items()):
            return data
        same = data.hashes["data"] == self.hashes["data"]
        if split.users == "known":
            raise ConfigError(
                f"task '{data.task.name}' tests users on ratings that meta-training did not see, and its "
                f"{'split' if same else 'data'} changed since: which those are is not known",
                "Fit on it again",
            )
        digests = _digests(self.hashes["data"], users)
        validated = np.isin(digests, self.validation)
        seen = validated | np.isin(digests, self.train)
        by_part = same or split.by == "time" or split.transfer is not None or bool(split.files)
        test = data.parts["test"] if by_part else np.arange(len(users))
        test = test[~seen[test]]
        if len(test) == 0:
            raise DataError(
                f"no user of task '{data.task.name}' is left to test: all were in meta-training or validation",
                "Fit again on these data, or give back those it was fitted on",
            )
        _LOG.warning(
            "the %s of task '%s' changed since fitting: the %d users are tested that fitting did not see",
            "split" if same else "data",
            data.task.name,
            len(test),
        )
        parts: Mapping[SplitPart, Codes] = {
            "train": np.flatnonzero(seen & ~validated),
            "validation": np.flatnonzero(validated),
            "test": test,
        }
        return replace(data, parts=parts)


def _digests(salt: str, users: Iterable[str]) -> Codes:
    """Returns 64 bits of every user's salted digest, shape (users,)."""
    start = hashlib.sha256(salt.encode())
    found = bytearray()
    for user in users:
        digest = start.copy()
        digest.update(user.encode("utf-8", "surrogatepass"))
        found += digest.digest()[:8]
    return np.frombuffer(bytes(found), "<i8").astype(np.int64)


def refuse_other_catalog(task: str, fitted: Catalog, found: Catalog) -> None:
    """Refuses a task whose items are not those that a recommender was fitted on.

    Args:
        task: The task's name.
        fitted: The catalog it was fitted on.
        found: The task's.

    Raises:
        ConfigError: They differ.
    """
    if differences := _differences(fitted, found):
        raise ConfigError(f"task '{task}' has another catalog than was fitted: {differences}", "Fit on it again")


def _differences(fitted: Catalog, found: Catalog) -> str:
    """Says how a catalog differs from the one a recommender was fitted on; nothing where it does not.

    Args:
        fitted: The catalog it was fitted on.
        found: The other one; fields that `fitted` does not have do not count.
    """
    if fitted.ids != found.ids:
        new, gone = sorted(set(found.ids) - set(fitted.ids)), sorted(set(fitted.ids) - set(found.ids))
        said = [f"{len(ids)} {what} (e.g. {shown(ids[0])})" for ids, what in ((new, "new"), (gone, "gone")) if ids]
        return f"of its items {' and '.join(said)}" if said else "its items are in another order"
    said = []
    for name, column in fitted.fields.items():
        if name not in found.fields:
            said.append(f"field '{name}' is gone")
            continue
        changed = [code for code, value in enumerate(column) if value != found.fields[name][code]]
        if changed:
            first = changed[0]
            values = f"{shown(found.fields[name][first])} instead of {shown(column[first])}"
            said.append(f"'{name}' of {len(changed)} items changed (item {shown(fitted.ids[first])}: {values})")
    return " and ".join(said[:2])
