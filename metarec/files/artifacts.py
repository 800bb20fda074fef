"""Files that survive a crash and notice damage: atomic replacement, SHA-256 manifests, the cache directory.

Everything metarec keeps is safetensors, JSON, Parquet or YAML. safetensors has no payload checksum of its own, so
every directory written here carries ``manifest.json`` and is refused when a byte of it changed. Knows nothing of
what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metarec.errors import ArtifactError
from metarec.files.exchange import beside, exchange, put_back, room_for

_LOG = logging.getLogger(__name__)
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# Where digests of large files are kept, what large is, and how old the last write to one has to be: file systems count
# time in steps of up to two seconds.
_DIGESTS, _LARGE_BYTES, _SETTLED_NS = "digests", 16 << 20, 3 * 10**9


def cache_dir() -> Path:
    """Returns where derived files are kept: ``$METAREC_CACHE``, else ``$XDG_CACHE_HOME/metarec`` or ``~/.cache``."""
    explicit = os.environ.get("METAREC_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metarec"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a crash leaves either the old content or the new, never half of it.

    Args:
        path: The file to create or replace; its directory is made.
        write: Called with the path of a temporary file in the same directory.

    Raises:
        ArtifactError: The disk is full.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path, lambda fresh: fresh.touch(exist_ok=False)) as temporary:
            write(temporary)
            _fsync(temporary)
            temporary.replace(path)
        _fsync(path.parent)


@contextmanager
def replace_dir(path: Path, kind: str, *, private: bool = False) -> Iterator[Path]:
    """Writes a directory of files with a manifest; whatever happens meanwhile, the old or the new one is whole.

    Args:
        path: The directory to create or replace.
        kind: What the directory is (``checkpoint``, ``adapter``), checked by `verify_dir`.
        private: Nobody but the owner may read it; otherwise whom the umask says.

    Yields:
        A temporary directory to write into.

    Raises:
        ArtifactError: `path` exists and was not written by this function, or the disk is full.
    """
    if path.exists() and not (path / MANIFEST).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"'{path}' exists and is not a metarec {kind}", "Choose another directory")
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_dir(path)
        with beside(path, lambda fresh: fresh.mkdir(mode=0o700 if private else 0o777)) as temporary:
            yield temporary
            for file in temporary.iterdir():  # safetensors lets nobody but the owner read what it writes
                file.chmod(temporary.stat().st_mode & 0o666)
            write_manifest(temporary, kind)
            exchange(temporary, path)
            _fsync(path.parent)


def recover_dir(path: Path) -> bool:
    """Puts a directory back that a process was killed while replacing; says whether there is one now."""
    found = put_back(path, lambda left: _damage(left) is None)
    if found is not None:
        _LOG.warning("'%s' is put back: a process was killed while it replaced it", path)
    return path.exists()


def write_manifest(path: Path, kind: str) -> None:
    """Writes the manifest of a directory's files and makes all of them durable."""
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name != MANIFEST)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "sha256": {file.name: sha256_file(file) for file in files},
    }
    for file in files:
        _fsync(file)
    write_json(path / MANIFEST, manifest)


def verify_dir(path: Path, kind: str) -> None:
    """Checks every file of a directory against its manifest.

    Raises:
        ArtifactError: The directory is missing, of another kind or schema, or a file is missing or changed.
    """
    recover_dir(path)
    if (damage := _damage(path, kind)) is not None:
        raise damage


def is_whole(path: Path, kind: str) -> bool:
    """Says whether a directory that can be made again is there and as it was written; notes it where it is damaged."""
    if not recover_dir(path):
        return False
    damage = _damage(path, kind)
    if damage is not None and (path / MANIFEST).exists():
        _LOG.warning("%s; it is made again", damage.problem)
    return damage is None


def _damage(path: Path, kind: str | None = None) -> ArtifactError | None:
    """Returns what is wrong with a directory; None where nothing is.

    Args:
        path: The directory.
        kind: What it has to be; None takes any.
    """
    named = kind or "directory"
    file = path / MANIFEST
    if not file.exists():
        return ArtifactError(f"'{path}' holds no metarec {named} ('{MANIFEST}' is missing)", "Check the path")
    again = f"Write the {named} again"
    try:
        manifest = load_json(file)
    except ArtifactError as error:
        return error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        return ArtifactError(f"'{file}' is not a manifest", again)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        return ArtifactError(
            f"'{path}' has schema version {manifest.get('schema_version')}, this metarec reads {SCHEMA_VERSION}",
            f"{again}, or install the metarec that wrote it",
        )
    if kind is not None and manifest.get("kind") != kind:
        return ArtifactError(f"'{path}' holds a metarec {manifest.get('kind')}, not a {kind}", "Check the path")
    for name, digest in manifest["sha256"].items():
        part = path / name
        if Path(name).name != name or not part.is_file() or sha256_file(part) != digest:
            return ArtifactError(f"'{part}' is missing, truncated or altered", again)
    return None


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content.

    That of a large file is kept in the cache, under the file's path, inode, size and times: a write to the file moves
    its times, so that it is read again. A file of the last seconds is always read: its next write might not.
    """
    before = path.stat()
    if before.st_size < _LARGE_BYTES:
        return _sha256_of(path)
    known = cache_dir() / _DIGESTS / content_hash(_identity(path, before))
    if (found := _known_digest(known)) is not None:
        return found
    began = time.time_ns()
    digest = _sha256_of(path)
    settled = max(before.st_mtime_ns, before.st_ctime_ns) < began - _SETTLED_NS
    if settled and _identity(path, path.stat()) == _identity(path, before):
        with suppress(OSError, ArtifactError):  # a cache that cannot be written costs time alone
            write_json(known, {"sha256": digest, "of": content_hash(digest)})
    return digest


def _identity(path: Path, facts: os.stat_result) -> list[str | int]:
    return [str(path.absolute()), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _known_digest(known: Path) -> str | None:
    """Returns a digest that was kept, None where there is none or its own file is damaged."""
    try:
        kept = load_json(known)
        digest = str(kept["sha256"])
        return digest if kept["of"] == content_hash(digest) else None
    except (ArtifactError, OSError, KeyError, TypeError):
        return None


def _sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def content_hash(value: object) -> str:
    """Returns 16 hexadecimal digits that name a JSON-able value by its content."""
    return hashlib.sha256(dump_json(value).encode()).hexdigest()[:16]


def dump_json(value: object) -> str:
    """Returns strict JSON (no NaN, sorted keys) with a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Writes strict JSON atomically."""
    replace_file(path, lambda target: target.write_text(dump_json(value), encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Reads strict JSON.

    Raises:
        ValueError: It is not JSON, repeats a key, or holds NaN or Infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"holds {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("repeats a key")
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def load_json(path: Path) -> Any:
    """Reads a file of strict JSON.

    Raises:
        ArtifactError: The file is missing, or not what `parse_json` reads.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"'{path}' does not exist", "Check the path") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' is not valid JSON: {error}", "Write it again") from None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
