"""Small worlds for tests: a tiny random Llama, BERT and GPT-2 on disk, and ratings whose answer is known."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread, in the processes that tests start too: with several, sums are added in another order from run to run, and
# tests that run side by side get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from small_models import CAUSAL, tiny_model

from metarec.data.interactions import Catalog, Interactions, RatingScale
from metarec.data.templates import PromptTemplate
from metarec.lm.backbone import Backbone
from metarec.lm.loading import load_backbone
from metarec.lm.tokenized import CatalogPrompts, tokenize_catalog

WORDS = """
the a of night day love war star road man woman king dead blue red city river house game dream
is this good movie answer drama comedy action horror music Yes No : , . ( ) ?
""".split()  # noqa: SIM905 - forty quoted words are harder to read
GENRES = ("drama", "comedy", "action", "horror")


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """A shell starts what it runs in the background with Ctrl-C ignored, and so would be the processes of tests."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Forward caches of tests stay out of the user's; the embedded model, costly to unpack, is shared."""
    real = Path(os.environ.get("METAREC_CACHE") or Path.home() / ".cache" / "metarec")
    own = tmp_path_factory.mktemp("cache")
    for shared in ("models", "data"):
        (real / shared).mkdir(parents=True, exist_ok=True)
        (own / shared).symlink_to(real / shared)
    os.environ["METAREC_CACHE"] = str(own)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _tokenizer(special: dict[str, str]) -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: code for code, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _save(path: Path, model: object, tokenizer: object) -> Path:
    model.save_pretrained(path)  # type: ignore[attr-defined]
    tokenizer.save_pretrained(path)  # type: ignore[attr-defined]
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of a tiny random model of `small_models`: ``llama``, ``mistral``, ``bert``, ...."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        path = root / family
        if path.exists():
            return path
        torch.manual_seed(7)
        if family in CAUSAL:
            tokenizer = _tokenizer({"unk_token": "<unk>", "pad_token": "<pad>"})
        else:
            special = {
                "unk_token": "[UNK]",
                "pad_token": "[PAD]",
                "mask_token": "[MASK]",
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
            }
            tokenizer = _tokenizer(special)
        return _save(path, tiny_model(family, len(tokenizer)), tokenizer)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def backbone(model_dir: Callable[[str], Path]) -> Callable[..., Backbone]:
    """Returns a loaded tiny model of a family, once per session and precision."""
    from transformers import PreTrainedTokenizerFast

    loaded: dict[tuple[str, torch.dtype], Backbone] = {}

    def load(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
        key = (family, dtype)
        if key not in loaded:
            found = load_backbone(str(model_dir(family)), dtype=dtype)
            # Some architectures bring a tokenizer of their own, which reads our words in another way.
            words = PreTrainedTokenizerFast.from_pretrained(model_dir(family))
            loaded[key] = replace(found, open_tokenizer=lambda: words)
        return loaded[key]

    return load


TEMPLATES = {
    "causal": PromptTemplate("is this a good movie ? {{ title }} , {{ genres }} answer :", " Yes", " No"),
    "masked": PromptTemplate("is this a good movie ? {{ title }} , {{ genres }} answer : {{ mask }} .", "Yes", "No"),
    "encoder": PromptTemplate("{{ title }} , {{ genres }}", "a good movie", "a dead movie"),
}


def small_catalog(items: int = 40, seed: int = 0) -> Catalog:
    """Titles of one to six words, one genre each; item i has genre i mod 4."""
    generator = np.random.default_rng(seed)
    titles = [f"{' '.join(generator.choice(WORDS[:20], generator.integers(1, 6)))}" for _ in range(items)]
    return Catalog(
        ids=tuple(f"m{code}" for code in range(items)),
        fields={
            "title": tuple(f"{title} {WORDS[code % 20]}" for code, title in enumerate(titles)),
            "genres": tuple(GENRES[code % 4] for code in range(items)),
        },
    )


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Forty small items."""
    return small_catalog()


@pytest.fixture
def prompts(backbone: Callable[..., Backbone], catalog: Catalog) -> Callable[[str], CatalogPrompts]:
    """Returns the small catalog's prompts as a family's tokenizer reads them."""

    def tokenize(family: str) -> CatalogPrompts:
        model = backbone(family)
        return tokenize_catalog(model, TEMPLATES[model.kind], catalog)

    return tokenize


def known_interactions(users: int = 60, items: int = 40, seed: int = 0) -> Interactions:
    """Every user rates 24 items; half the users like two genres and hate the others, the other half the reverse.

    An item mean knows almost nothing here, a few ratings tell everything.
    """
    generator = np.random.default_rng(seed)
    catalog = small_catalog(items)
    user, item, rating = [], [], []
    for code in range(users):
        for chosen in generator.choice(items, 24, replace=False):
            liked = (chosen % 4 < 2) == (code % 2 == 0)
            value = (4.5 if liked else 2.0) + generator.choice([-0.5, 0.0, 0.5])
            user.append(code)
            item.append(chosen)
            rating.append(value)
    return Interactions(
        users=tuple(f"u{code}" for code in range(users)),
        user=np.array(user, np.int64),
        item=np.array(item, np.int64),
        rating=np.array(rating, np.float32),
        timestamp=np.arange(len(user), dtype=np.int64),
        catalog=catalog,
        scale=RatingScale(0.5, 5.0),
        dropped={},
    )


@pytest.fixture(scope="session")
def interactions() -> Interactions:
    """Sixty users of two opposite tastes."""
    return known_interactions()


@dataclass
class Ran:
    """What a command did: its exit status, and what it printed where."""

    status: int
    out: str
    err: str


@pytest.fixture
def metarec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Returns what runs ``metarec`` with some arguments."""
    from metarec import cli

    monkeypatch.setenv("METAREC_TASKS", "")  # so that what --include-path adds goes again

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["metarec", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A real PostgreSQL server of our own, on a socket in a temporary directory."""
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed: no initdb")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    binaries = Path(found).resolve().parent
    as_user = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        import pwd

        try:
            as_user = {"user": pwd.getpwnam("postgres").pw_uid}
        except KeyError:
            pytest.skip("running as root, and there is no user 'postgres' to run the server as")
    root = Path(tempfile.mkdtemp(dir="/tmp", prefix="pg"))
    root.chmod(0o777)
    try:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **as_user}
        subprocess.run(
            [binaries / "initdb", "-D", root / "data", "-A", "trust", "-U", "metarec", "--no-sync"], check=True, **quiet
        )
        # Files of the log are removed, not used again, as docs/serving.md says that erasing needs.
        facts = ("listen_addresses=", "fsync=off", "wal_recycle=off", "min_wal_size=32MB")
        command = [binaries / "postgres", "-D", root / "data", "-k", root, *(f"-c{fact}" for fact in facts)]
        server = subprocess.Popen(command, **quiet)
        try:
            url = f"postgresql://metarec@/postgres?host={root}"
            deadline = time.monotonic() + 30
            while subprocess.run([binaries / "pg_isready", "-h", root], check=False, **quiet).returncode:
                assert time.monotonic() < deadline, "PostgreSQL did not start"
                time.sleep(0.05)
            yield url
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    finally:
        shutil.rmtree(root, ignore_errors=True)
