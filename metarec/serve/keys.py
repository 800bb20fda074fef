"""API keys: what each may do, until when, and the file that holds their hashes."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from metarec.errors import ConfigError

_LOG = logging.getLogger(__name__)
SCOPES = ("read", "write", "erase", "admin")
_MAKE_KEYS = "Run: metarec api-key FILE --name NAME"
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}) +([0-9a-f]{64})(?: +([a-z,]+))?(?: +(\d{4}-\S+))?\s*")
# How often the key file is looked at.
_RELOAD_SECONDS = 1.0


@dataclass(frozen=True)
class ApiKey:
    """A key's name and the SHA-256 of the key; only its owner has the key itself.

    Args:
        name: Whose it is.
        digest: SHA-256 of the key, in hexadecimal.
        scopes: What it may do, of `SCOPES`.
        until: When it expires, seconds since the epoch; None never.
    """

    name: str
    digest: str
    scopes: tuple[str, ...] = SCOPES
    until: float | None = None

    @property
    def expired(self) -> bool:
        """Whether it is no longer taken."""
        return self.until is not None and time.time() >= self.until

    @property
    def line(self) -> str:
        """Its line of a key file."""
        if self.until is None:
            return f"{self.name} {self.digest} {','.join(self.scopes)}\n"
        until = datetime.fromtimestamp(self.until, timezone.utc).isoformat(timespec="seconds")
        return f"{self.name} {self.digest} {','.join(self.scopes)} {until}\n"


def new_key(name: str, scopes: Collection[str] = SCOPES, days: float | None = None) -> tuple[str, ApiKey]:
    """Returns a new key of 256 random bits, and its entry for the key file.

    Args:
        name: Whose it is.
        scopes: What it may do.
        days: After how many days it expires; None never.

    Raises:
        ConfigError: The name is too long or has other characters than letters, digits, '.', '_' and '-'; or there is
            no such scope.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"the key's name {name!r} is not plain", "Use letters, digits, '.', '_' and '-'")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise ConfigError(f"there is no scope '{unknown[0]}'", f"Choose from {', '.join(SCOPES)}")
    key = secrets.token_urlsafe(32)
    until = None if days is None else (datetime.now(timezone.utc) + timedelta(days=days)).timestamp()
    chosen = tuple(scope for scope in SCOPES if scope in scopes)
    return key, ApiKey(name, hashlib.sha256(key.encode()).hexdigest(), chosen, until)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Reads a key file: one ``NAME SHA256 [SCOPES [UNTIL]]`` a line, as ``metarec api-key`` writes it.

    Raises:
        ConfigError: A line is not of that form, a name comes twice, or there is no key.
    """
    keys = _entries(path.read_text(encoding="utf-8"), path)
    if not keys or len({key.name for key in keys}) < len(keys):
        raise ConfigError(f"'{path}' holds no key, or a name twice", _MAKE_KEYS)
    return keys


def add_key(path: Path, key: ApiKey) -> None:
    """Adds a key's line to a key file in place, so that its comments and permissions stay, and a mount sees it.

    Args:
        path: The file; it is made where there is none.
        key: The key.

    Raises:
        ConfigError: A line is not of the form of `read_keys`, or the file has a key of that name.
    """
    held = path.read_text(encoding="utf-8") if path.exists() else ""
    if any(known.name == key.name for known in _entries(held, path)):
        raise ConfigError(f"'{path}' has a key named '{key.name}'", "Choose another name, or remove its line")
    path.parent.mkdir(parents=True, exist_ok=True)
    gap = "\n" if held and not held.endswith("\n") else ""
    with path.open("a", encoding="utf-8") as file:
        file.write(gap + key.line)


def _entries(text: str, path: Path) -> tuple[ApiKey, ...]:
    """Returns the keys of a key file's text, which may be none."""
    return tuple(
        _read(line, f"line {number} of '{path}'")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.startswith("#")
    )


def _read(line: str, where: str) -> ApiKey:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ConfigError(f"{where} is not 'NAME SHA256 SCOPES UNTIL'", _MAKE_KEYS)
    name, digest, scopes, until = match.groups()
    chosen = SCOPES if scopes is None else tuple(scopes.split(","))
    if unknown := sorted(set(chosen) - set(SCOPES)):
        raise ConfigError(f"{where} has the scope '{unknown[0]}'", f"Choose from {', '.join(SCOPES)}")
    try:
        at = None if until is None else datetime.fromisoformat(until.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(f"{where} ends with no date", "Write it as 2030-01-31T00:00:00+00:00") from None
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=timezone.utc)
    return ApiKey(name, digest, chosen, None if at is None else at.timestamp())


class KeyFile:
    """The keys of a file, read again within a second after it changes.

    Args:
        path: The file.

    Raises:
        ConfigError: See `read_keys`. Later the keys that were read last stay where the file is wrong.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = read_keys(path)
        self._seen = path.stat().st_mtime_ns
        self._looked = time.monotonic()

    def __call__(self) -> tuple[ApiKey, ...]:
        """Returns the keys as they are now."""
        if time.monotonic() - self._looked >= _RELOAD_SECONDS:
            self._looked = time.monotonic()
            try:
                changed = self._path.stat().st_mtime_ns
                if changed != self._seen:
                    self._seen = changed
                    self._keys = read_keys(self._path)
            except (OSError, ValueError, ConfigError) as error:
                _LOG.error("the key file cannot be read", extra={"failure": type(error).__name__})
        return self._keys


def scope_of(method: str, path: str) -> str:
    """Returns what a request needs to be allowed to do."""
    if path.startswith("/v1/items") or path == "/metrics":
        return "admin"
    if method == "DELETE" or path == "/ui/forget":
        return "erase"
    return "write" if path.endswith("/feedback") or path == "/ui/rate" else "read"
