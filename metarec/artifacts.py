"""Files that survive a crash and notice damage: atomic replacement, SHA-256 manifests, the cache directory.

Everything metarec keeps is safetensors, JSON, Parquet or YAML. safetensors has no payload checksum of its own, so
every directory written here carries ``manifest.json`` and is refused when a byte of it changed. Knows nothing of
what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarec.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


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
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.touch(exist_ok=False)
    try:
        write(temporary)
        _fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


@contextmanager
def replace_dir(path: Path, kind: str, *, private: bool = False) -> Iterator[Path]:
    """Writes a directory of files with a manifest; it appears complete or not at all.

    Args:
        path: The directory to create or replace.
        kind: What the directory is (``checkpoint``, ``adapter``), checked by `verify_dir`.
        private: Nobody but the owner may read it; otherwise whom the umask says.

    Yields:
        A temporary directory to write into.

    Raises:
        ArtifactError: `path` exists and was not written by this function.
    """
    if path.exists() and not (path / MANIFEST).exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"'{path}' exists and is not a metarec {kind}", "Choose another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir(mode=0o700 if private else 0o777)
    try:
        yield temporary
        for file in temporary.iterdir():  # safetensors lets nobody but the owner read what it writes
            file.chmod(temporary.stat().st_mode & 0o666)
        write_manifest(temporary, kind)
        # A directory cannot be renamed over a full one: the old one steps aside first and is removed last.
        aside = temporary.with_name(temporary.name + ".old")
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(path.parent)


def _beside(path: Path) -> Path:
    """Returns a free name beside a path. Made without `tempfile`, whose files nobody but their owner may read."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


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
    file = path / MANIFEST
    if not file.exists():
        raise ArtifactError(f"'{path}' holds no metarec {kind} ('{MANIFEST}' is missing)", "Check the path")
    manifest = load_json(file)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise ArtifactError(f"'{file}' is not a manifest", f"Write the {kind} again")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"'{path}' has schema version {manifest.get('schema_version')}, this metarec reads {SCHEMA_VERSION}",
            f"Write the {kind} again, or install the metarec that wrote it",
        )
    if manifest.get("kind") != kind:
        raise ArtifactError(f"'{path}' holds a metarec {manifest.get('kind')}, not a {kind}", "Check the path")
    for name, digest in manifest["sha256"].items():
        part = path / name
        if Path(name).name != name or not part.is_file() or sha256_file(part) != digest:
            raise ArtifactError(f"'{part}' is missing, truncated or altered", f"Write the {kind} again")


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content."""
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
