"""Which run is served to whom: a directory with one small file that names a current run and perhaps a candidate.

The file is replaced in one step, so that a crash leaves the old deployment or the new one. Runs are named by path and
by the SHA-256 of their manifest: one that was trained anew is not the one that was deployed. A share of
the users, by a digest of their pseudonym in the store and of the candidate, is served by the candidate.

Source: Kohavi et al. 2009, "Controlled experiments on the web", section 4.2, for assigning users by a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metarec.errors import ArtifactError, ConfigError
from metarec.files.artifacts import MANIFEST, content_hash, load_json, sha256_file, verify_dir, write_json
from metarec.files.run_directory import DEPLOYMENT, FACTS, recommender_dir

if TYPE_CHECKING:
    from metarec.serve.prequential import Sums

_FORMAT = 1
Verdict = Literal["better", "not worse", "worse", "undecided"]
# Before so many judged ratings of each model, from so many groups of users, nothing is decided.
FEWEST_RATINGS, FEWEST_GROUPS = 200, 10
# How much lower the AUC may be at the interval's lower end for a candidate that is not worse.
MARGIN = 0.01
# How many more of the adaptations may diverge.
_MORE_DIVERGED = 0.02


@dataclass(frozen=True)
class DeployedRun:
    """A run that is served.

    Args:
        run: Its directory, absolute.
        content: SHA-256 of its recommender's manifest.
    """

    run: str
    content: str

    @classmethod
    def of(cls, run: Path) -> DeployedRun:
        """Names a run by its content.

        Raises:
            ConfigError: It holds no recommender.
            ArtifactError: A file of it is damaged.
        """
        found = recommender_dir(run)
        if found is None or (run / DEPLOYMENT).is_file():
            raise ConfigError(f"'{run}' holds no trained recommender", f"Run: metarec train --name {run.name}")
        verify_dir(found, "recommender")
        return cls(str(run.absolute()), sha256_file(found / MANIFEST))

    def check(self) -> None:
        """Checks that the run is the one that was deployed.

        Raises:
            ArtifactError: It is gone, or another one lies there now.
        """
        found = recommender_dir(Path(self.run))
        if found is None or sha256_file(found / MANIFEST) != self.content:
            raise ArtifactError(
                f"'{self.run}' is not the run that was deployed",
                "Put it back, or deploy what is there under a new name",
            )


@dataclass(frozen=True)
class Deployment:
    """What is served.

    Args:
        current: Served to all users but the canary's.
        candidate: Served to the canary's users; None where there is no canary.
        share: The share of users in the canary.
        previous: What was current before; None at first.
        changed: When this was decided, as ISO 8601.
    """

    current: DeployedRun
    candidate: DeployedRun | None = None
    share: float = 0.0
    previous: DeployedRun | None = None
    changed: str = ""

    @property
    def period(self) -> str:
        """Names the time in which two models are compared; feedback of other times does not count."""
        return "always" if self.candidate is None else content_hash(asdict(self))

    def runs(self) -> list[DeployedRun]:
        """Returns what is served: the current run, and the candidate if there is one."""
        return [self.current, *([self.candidate] if self.candidate else [])]

    def in_canary(self, pseudonym: str) -> bool:
        """Says whether a user is served by the candidate.

        With a larger share those who were in the canary of a candidate stay in it; that of another one has other users.

        Args:
            pseudonym: What stands for the user in the store's audit log.
        """
        if self.candidate is None:
            return False
        digest = hashlib.sha256(f"{self.candidate.content}/{pseudonym}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < self.share

    def started(self, candidate: DeployedRun, share: float) -> Deployment:
        """Returns the deployment with a canary.

        Raises:
            ConfigError: Another candidate is in a canary, it is the current run, or the share is none.
        """
        if self.candidate is not None and self.candidate != candidate:
            raise ConfigError(
                f"'{self.candidate.run}' is in a canary already",
                "Promote it, or roll it back, before you start another",
            )
        if candidate.content == self.current.content:
            raise ConfigError(f"'{candidate.run}' is what is served already", "Name the run that was trained since")
        if not 0 < share < 1:
            raise ConfigError(f"--share is {share:g}", "Give a share of the users above 0 and below 1, as 0.1")
        return replace(self, candidate=candidate, share=share, changed=_now())

    def promoted(self) -> Deployment:
        """Returns the deployment with the candidate as current.

        Raises:
            ConfigError: There is none.
        """
        if self.candidate is None:
            raise ConfigError("there is no candidate to promote", "Start one: metarec deploy start DIR --run RUN")
        return Deployment(self.candidate, previous=self.current, changed=_now())

    def rolled_back(self) -> Deployment:
        """Returns the deployment without its candidate; where there is none, with what was current before.

        Raises:
            ConfigError: There is neither.
        """
        if self.candidate is not None:
            return replace(self, candidate=None, share=0.0, changed=_now())
        if self.previous is None:
            raise ConfigError("there is nothing to roll back to", "Start a canary of another run instead")
        return Deployment(self.previous, previous=self.current, changed=_now())


def read_deployment(folder: Path) -> Deployment:
    """Reads what a directory deploys.

    Raises:
        ConfigError: There is nothing.
        ArtifactError: The file is damaged.
    """
    file = folder / DEPLOYMENT
    if not file.is_file():
        raise ConfigError(f"'{folder}' holds no deployment", f"Run: metarec deploy create {folder} --run RUN")
    found = load_json(file)
    try:
        if found["format"] != _FORMAT:
            raise ArtifactError(
                f"'{file}' has format {found['format']}, this metarec reads {_FORMAT}", "Write it again"
            )
        current, candidate, previous = (
            None if found[name] is None else DeployedRun(str(found[name]["run"]), str(found[name]["content"]))
            for name in ("current", "candidate", "previous")
        )
        assert current is not None
        return Deployment(current, candidate, float(found["share"]), previous, str(found["changed"]))
    except (KeyError, TypeError, ValueError, AssertionError):
        raise ArtifactError(f"'{file}' is not a deployment", "Write it again") from None


def create_deployment(folder: Path, run: DeployedRun) -> Deployment:
    """Writes a new deployment; returns it.

    Raises:
        ConfigError: There is one already.
    """
    if (folder / DEPLOYMENT).exists():
        raise ConfigError(
            f"'{folder}' holds a deployment already", "Change it: metarec deploy start, promote, rollback"
        )
    made = Deployment(run, changed=_now())
    _write(folder, made)
    return made


def change_deployment(folder: Path, change: Callable[[Deployment], Deployment]) -> Deployment:
    """Replaces a deployment by what a function makes of it, while no other process does; returns the new one.

    Raises:
        ConfigError: There is none.
    """
    from filelock import FileLock

    read_deployment(folder)
    with FileLock(folder / f".{DEPLOYMENT}.lock"):
        changed = change(read_deployment(folder))
        _write(folder, changed)
    return changed


def _write(folder: Path, deployment: Deployment) -> None:
    write_json(folder / DEPLOYMENT, {"format": _FORMAT, **asdict(deployment)})


def refuse_unlike(current: DeployedRun, candidate: DeployedRun) -> int:
    """Refuses a candidate that cannot serve the same users.

    Returns:
        How many of the current run's items the candidate does not know.

    Raises:
        ConfigError: Its ratings are on another scale, or its likes are others.
    """
    facts, items = [], []
    for deployed in (current, candidate):
        found = recommender_dir(Path(deployed.run))
        assert found is not None
        facts.append(load_json(found / FACTS))
        items.append(set(load_json(found / "catalog.json")["ids"]))
    for what, values in (
        ("scale", [one["scale"] for one in facts]),
        ("label", [[one["task"].get("label"), one["task"].get("like_threshold")] for one in facts]),
    ):
        if values[0] != values[1]:
            raise ConfigError(
                f"the {what} of '{candidate.run}' is {values[1]}, that of '{current.run}' {values[0]}",
                "Train it on the store of the service",
            )
    return len(items[0] - items[1])


@dataclass(frozen=True)
class Comparison:
    """What feedback says of a candidate beside the current model, for different users at the same time.

    Args:
        auc: How much higher its AUC is, with the ends of the 95% interval; None where too little is known.
        log_loss: The same of its log-loss; lower is better.
        diverged: How much larger its share of diverged adaptations is; None where there were none.
        verdict: What follows.
        because: Why, as a sentence.
    """

    auc: tuple[float, float, float] | None
    log_loss: tuple[float, float, float] | None
    diverged: float | None
    verdict: Verdict
    because: str


def compare(current: Sums, candidate: Sums, margin: float = MARGIN) -> Comparison:
    """Compares a candidate with the current model by the feedback of a canary.

    It is worse where the whole interval of its AUC, or of its log-loss, is on the bad side, or clearly more adaptations
    diverge; better where that of its AUC is on the good side; not worse where the AUC's lower end is within the margin.

    Args:
        current: Sums of the current model, during the canary.
        candidate: Sums of the candidate.
        margin: How much lower the AUC may be.
    """
    from metarec.serve.prequential import difference

    auc, loss = difference(candidate, current, "pairs"), difference(candidate, current, "losses")
    shares = candidate.diverged, current.diverged
    diverged = None if None in shares else float(shares[0] or 0) - float(shares[1] or 0)

    def found(verdict: Verdict, because: str) -> Comparison:
        return Comparison(auc, loss, diverged, verdict, because)

    if diverged is not None and diverged > _MORE_DIVERGED:
        return found("worse", f"{diverged:.0%} more of its adaptations diverge")
    for whose, sums in (("the candidate", candidate), ("the current model", current)):
        groups = int((sums.arrays["pairs"][..., 0].sum(0) > 0).sum())
        if sums.came < FEWEST_RATINGS or groups < FEWEST_GROUPS:
            return found(
                "undecided",
                f"{whose} has {sums.came} ratings from {groups} groups of users with pairs, "
                f"and {FEWEST_RATINGS} from {FEWEST_GROUPS} are needed",
            )
    assert auc is not None
    if auc[2] < 0:
        return found("worse", "the interval of its AUC is below 0")
    if loss is not None and loss[1] > 0:
        return found("worse", "the interval of its log-loss is above 0")
    if auc[1] > 0:
        return found("better", "the interval of its AUC is above 0")
    if auc[1] > -margin:
        return found("not worse", f"its AUC is at most {margin:g} lower")
    return found("undecided", f"its AUC may be more than {margin:g} lower, and may be higher")


def models_name(period: str) -> str:
    """Returns the name of the fact of a store that says which models are compared in a period."""
    return f"compared/{period}"


def sums_of(fact: Callable[[str], str | None], deployment: Deployment) -> dict[str, Sums]:
    """Returns what a store has summed of a canary, by ``current`` and ``candidate``.

    Args:
        fact: Returns a fact of the store by name.
        deployment: The deployment.
    """
    from metarec.serve.prequential import Sums
    from metarec.serve.watch import sums_name

    named: Mapping[str, Any] = json.loads(fact(models_name(deployment.period)) or "{}")
    found = {}
    for role in ("current", "candidate"):
        text = fact(sums_name(deployment.period, named[role])) if role in named else None
        found[role] = Sums.empty() if text is None else Sums.from_json(json.loads(text))
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
