"""Models of the Hugging Face hub: fetched once, then read from the cache; what cannot be read is refused at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from metarec.errors import BackboneError
from metarec.lm import hub

COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """A hub that serves a folder's files as the model ``tiny/llama``; `asked` has the paths of requests for models."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        # The hub's library asks for other things of its own accord.
        if path.startswith("/api/models/") or "/resolve/" in path:
            self.server.asked.append(path)
        if path in ("/api/models/tiny/llama", "/api/models/tiny/llama/revision/main"):
            files = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            body = json.dumps({"id": "tiny/llama", "sha": COMMIT, "siblings": files}).encode()
            self._answer(200, body, {"Content-Type": "application/json"})
            return
        file = self.server.folder / path.rpartition("/")[2]
        if path.startswith("/tiny/llama/resolve/") and file.is_file():
            body = file.read_bytes()
            self._answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
            return
        known = path.startswith(("/tiny/llama", "/api/models/tiny/llama"))
        code = "EntryNotFound" if known else "RepoNotFound"
        self._answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815 - a name of http.server's


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], FakeHub]]:
    """Returns what serves a folder as the model ``tiny/llama``."""
    started: list[FakeHub] = []

    def start(folder: Path) -> FakeHub:
        started.append(FakeHub(folder))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Returns what makes an address the hub, with a cache that is empty."""

    def set_hub(address: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    return set_hub


def hub_at(address: str, home: Path) -> dict[str, str]:
    """An environment with a hub at an address, and its cache in a folder."""
    return {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


TWICE = """
from metarec.lm.loading import load_backbone
first = load_backbone("tiny/llama")
print(flush=True)
input()
print(load_backbone("tiny/llama").fingerprint == first.fingerprint, first.location)
"""


def test_a_model_is_fetched_once_and_loads_without_a_network_from_then_on(
    model_dir: Callable[[str], Path], serve: Callable[[Path], FakeHub], tmp_path: Path
) -> None:
    server = serve(model_dir("llama"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", TWICE]
    with subprocess.Popen(command, env=hub_at(server.address, tmp_path), text=True, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout is not None
        assert child.stdout.readline() == "\n"
        fetched = list(server.asked)
        out, _ = child.communicate("\n", timeout=240)
    assert f"/tiny/llama/resolve/{COMMIT}/model.safetensors" in fetched
    assert out.split() == ["True", "tiny/llama"]
    assert server.asked == fetched


def test_an_unknown_name_without_a_network_is_answered_at_once(tmp_path: Path) -> None:
    """Nothing listens at port 9; the loaders alone retry for half a minute."""
    began = time.monotonic()
    command = [sys.executable, "-m", "metarec.cli", "doctor", "--backbone", "no/such-model"]
    environment = hub_at("http://127.0.0.1:9", tmp_path)
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    seconds = time.monotonic() - began
    assert found.returncode == 2
    assert "no directory 'no/such-model'" in found.stderr
    assert "hf download no/such-model" in found.stderr
    assert found.stderr.count("\n") == 1
    assert seconds < 20


def test_one_request_says_that_a_hub_lacks_a_model(
    serve: Callable[[Path], FakeHub], reach: Callable[[str], None], tmp_path: Path
) -> None:
    server = serve(tmp_path)
    reach(server.address)
    with pytest.raises(BackboneError, match=r"no such model on the Hugging Face hub. Check the name"):
        hub.find_on_hub("no/such-model")
    assert server.asked == ["/api/models/no/such-model"]
    with pytest.raises(BackboneError, match="the Hugging Face hub has no such names"):
        hub.find_on_hub("no such model")


@pytest.mark.parametrize(
    "files",
    [
        ("pytorch_model.bin",),
        ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_a_model_of_pickled_weights_is_refused_before_anything_is_fetched(
    files: tuple[str, ...],
    model_dir: Callable[[str], Path],
    serve: Callable[[Path], FakeHub],
    reach: Callable[[str], None],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model_dir("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in files:
        (folder / file).write_bytes(b"pickled")
    server = serve(folder)
    reach(server.address)
    with pytest.raises(
        BackboneError, match=r"'tiny/llama' has pickled weights alone \('pytorch_model.*bin'\).* Convert"
    ):
        hub.find_on_hub("tiny/llama")
    assert server.asked == ["/api/models/tiny/llama"]
    (folder / "model.safetensors").write_bytes(b"weights beside them")
    assert not hub.find_on_hub("tiny/llama")


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer*", "config.json", "a shard"])
def test_what_an_interrupted_download_left_is_fetched_again(
    lost: str,
    model_dir: Callable[[str], Path],
    serve: Callable[[Path], FakeHub],
    reach: Callable[[str], None],
    tmp_path: Path,
) -> None:
    server = serve(model_dir("llama"))
    reach(server.address)
    model = tmp_path / "hub" / "models--tiny--llama"
    snapshot = model / "snapshots" / COMMIT
    shutil.copytree(model_dir("llama"), snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    assert hub.find_on_hub("tiny/llama")
    assert server.asked == []
    if lost == "a shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "another.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        for file in snapshot.glob(lost):
            file.unlink()
    assert not hub.find_on_hub("tiny/llama")
    assert server.asked == ["/api/models/tiny/llama"]
