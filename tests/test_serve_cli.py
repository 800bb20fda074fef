"""The service as a process, and the verbs of its store."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from serving import LOVES_DRAMA, LOVES_HORROR, listening, small_recommender
from small_recommenders import SETTINGS, known_task
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
from metarec.cli import app
from metarec.config import RunConfig, validated
from metarec.data.interactions import Ratings
from metarec.errors import ArtifactError, ConfigError, DataError, MetarecError, StoreError
from metarec.meta.inner_loop import Adapted
from metarec.recommender import MetaRecommender
from metarec.scorers.language.adapted import MetaScorer
from metarec.serve.app import create_app
from metarec.serve.bulk import adapt_users, read_feedback
from metarec.serve.engine import Engine
from metarec.serve.keys import read_keys
from metarec.serve.records import Feedback, NewAdapter
from metarec.serve.service import ServeSettings
from metarec.serve.store import AdapterStore
from metarec.serve.vllm import export_adapters
from metarec.system.tensors import read_tensors

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def recommender(model_dir: Callable[[str], Path]) -> MetaRecommender:
    return small_recommender(model_dir("llama"))


@pytest.fixture(scope="session")
def checkpoint(recommender: MetaRecommender, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "model"
    recommender.save_pretrained(path)
    return path


@pytest.fixture
def feedback(tmp_path: Path) -> Path:
    file = tmp_path / "feedback.csv"
    rows = [f"user{number},{item},{rating}" for number in range(6) for item, rating in LOVES_DRAMA]
    rows += [f"bob,{item},{rating}" for item, rating in LOVES_HORROR]
    file.write_text("\n".join(["user,item,rating", *rows]) + "\n")
    return file


def invoke(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(result.exception, MetarecError):
        raise result.exception
    return result


def facts(*arguments: Any) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_bulk_adapts_everybody_once_and_goes_on_where_it_stopped(
    recommender: MetaRecommender, checkpoint: Path, feedback: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    done = facts("adapt", checkpoint, "--users", feedback, "--store", store)
    assert (done["users"], done["ratings"], done["adapted"]) == (7, 35, 7)
    again = facts("adapt", checkpoint, "--users", feedback, "--store", store)
    assert (again["users"], again["ratings"], again["adapted"]) == (7, 0, 0)
    assert facts("store", "ls", store) == {"store": store, "users": 7, "ratings": 35, "adapters": 7, "items": 0} | {
        "bytes": facts("store", "ls", store)["bytes"]
    }
    ranked = facts("recommend", checkpoint, "--store", store, "--user", "user3", "-k", 5, "--explain")
    assert ranked["adapter"]["version"] == 5
    expected = recommender.adapt(sorted(LOVES_DRAMA)).recommend(5)
    assert [entry["item"] for entry in ranked["items"]] == [entry.item for entry in expected]
    printed = invoke("recommend", checkpoint, "--store", store, "--user", "user3", "-k", 5, "--explain").stdout
    assert expected[0].title in printed
    assert " for " in printed, "every item says which rating moved it"
    with pytest.raises(StoreError, match="has no user"):
        invoke("recommend", checkpoint, "--store", store, "--user", "nobody")


def test_bulk_says_who_could_not_be_adapted_and_ends_with_status_1(
    checkpoint: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt = MetaScorer.adapt

    def fail(scorer: MetaScorer, supports: Sequence[Ratings], *others: Any) -> Adapted:
        if any(map(len, supports)):
            raise RuntimeError("out of memory")
        return adapt(scorer, supports, *others)

    given = ("adapt", checkpoint, "--users", feedback, "--store", tmp_path / "store")
    with monkeypatch.context() as patched:
        patched.setattr(MetaScorer, "adapt", fail)
        lost = invoke(*given, "--json")
    assert lost.exit_code == 1
    assert "7 users could not be adapted; run the same command again" in lost.stderr
    assert (json.loads(lost.stdout)["adapted"], json.loads(lost.stdout)["failed"]) == (0, 7)
    rest = facts(*given)
    assert (rest["adapted"], rest["failed"]) == (7, 0)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("adapt", "--users", "f.csv"), "--users and --store belong together"),
        (("adapt", "--users", "f.csv", "--store", "s", "--rating", "m1=4"), "one person's options are both given"),
        (("recommend", "--store", "s"), "--store is given without --user"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: tuple[str, ...], problem: str, checkpoint: Path
) -> None:
    verb, *rest = arguments
    with pytest.raises(ConfigError, match=problem):
        invoke(verb, checkpoint, *rest)


def test_bulk_that_is_interrupted_loses_nothing(
    recommender: MetaRecommender, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metarec.serve import bulk

    monkeypatch.setattr(bulk, "USERS_AT_ONCE", 2)
    engine = Engine(recommender, AdapterStore(tmp_path / "store"))
    users = read_feedback(feedback, engine)
    people, calls = engine.people, []

    def interrupted(names: Any) -> Any:
        calls.append(names)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return people(names)

    monkeypatch.setattr(engine, "people", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt_users(engine, users)
    assert engine.store.sizes()["adapters"] == 4
    rest = adapt_users(Engine(recommender, engine.store), users)
    assert (rest.adapted, rest.ratings) == (3, 5)
    assert engine.store.sizes()["ratings"] == 35


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\na,m1\n", "no column 'rating'"),
        ("user,item,rating\na,m1,5\na,m1x,5\n", "row 3: no item"),
        ("user,item,rating\na,m1,NaN\n", "row 2: .*not finite"),
        ('user,item,rating\na,"m1,5\n', "row 2 is not valid delimited text"),
        ("user,item,rating\n,m1,5\n", "row 2: the user id"),
    ],
)
def test_a_feedback_file_that_is_wrong_says_where(
    text: str, message: str, recommender: MetaRecommender, tmp_path: Path
) -> None:
    file = tmp_path / "feedback.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_feedback(file, Engine(recommender, AdapterStore(tmp_path / "store")))


@pytest.fixture
def full_store(recommender: MetaRecommender, feedback: Path, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "full")
    engine = Engine(recommender, store)
    adapt_users(engine, read_feedback(feedback, engine))
    return store


@pytest.fixture(scope="session")
def whole(model_dir: Callable[[str], Path]) -> MetaRecommender:
    """A recommender whose adapters act on all tokens of a prompt, as vLLM's do."""
    adapter = {"adapter": {**SETTINGS["adapter"], "active_tokens": None}}
    brief = {"train": {**SETTINGS["train"], "steps": 2, "validate_every": 2}}
    config = validated(RunConfig, SETTINGS | adapter | brief, "test")
    return MetaRecommender.from_pretrained(model_dir("llama"), config).fit(known_task())


@pytest.fixture
def whole_store(whole: MetaRecommender, feedback: Path, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "whole")
    engine = Engine(whole, store)
    adapt_users(engine, read_feedback(feedback, engine))
    return store


def test_the_store_verbs_list_verify_collect_export_and_erase(
    full_store: AdapterStore, recommender: MetaRecommender, tmp_path: Path
) -> None:
    where = full_store.location
    assert "bob\t5 ratings\tadapters: 5" in invoke("store", "ls", where, "--users").stdout
    assert facts("store", "verify", where) == {"checked": 7, "damaged": []}
    assert facts("store", "pseudonym", where, "--user", "bob") == {"pseudonym": full_store.pseudonym("bob")}
    held = invoke("store", "export", where, "--user", "bob", "--out", tmp_path / "bob")
    assert json.loads(held.stdout)["user"] == "bob"
    ranked, expected = (
        [entry.item for entry in user.recommend(3)]
        for user in (recommender.load_user(tmp_path / "bob"), recommender.adapt(LOVES_HORROR))
    )
    assert ranked == expected
    profile = full_store.profile("bob")
    assert profile is not None
    weights = full_store.path(full_store.records(profile.key)[0]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = invoke("store", "verify", where)
    assert result.exit_code == 1
    assert "version 5 of 'bob'" in result.stdout
    assert facts("store", "gc", where, "--dry-run")["would_remove"] == facts("store", "gc", where)["removed"] == 0
    assert facts("store", "erase-user", where, "--user", "bob") == {"erased": True}
    assert full_store.profile("bob") is None
    for command in ("export", "erase-user"):
        with pytest.raises(StoreError, match="no user 'bob'"):
            invoke("store", command, where, "--user", "bob")
    with pytest.raises(StoreError, match="holds no store"):
        invoke("store", "ls", tmp_path / "nothing")


def test_the_vllm_export_is_what_its_resolver_reads(whole_store: AdapterStore, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    names = facts("export", whole_store.location, "--vllm", "--out", out, "--base-model", "/models/base")
    assert len(names) == 7
    for user, name in names.items():
        assert user not in name
        config = json.loads((out / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["base_model_name_or_path"] == "/models/base"
        assert (out / name / "adapter_model.safetensors").exists()
        assert not (out / name / "user.json").exists()
        passes_vllms_checks(out / name)
    again = facts("export", whole_store.location, "--vllm", "--out", out, "--base-model", "/models/base")
    assert again == names
    with pytest.raises(StoreError, match="unknown"):
        invoke("export", whole_store.location, "--vllm", "--out", out, "--user", "nobody")
    with pytest.raises(ConfigError, match="--vllm"):
        invoke("export", whole_store.location, "--out", out)


def passes_vllms_checks(adapter: Path) -> None:
    """The rules of vLLM 0.33.0, written again here; where vLLM is installed, its own as well.

    Those of a configuration are in ``vllm/lora/peft_helper.py``, those of weights in ``vllm/lora/lora_model.py``.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert config["r"] <= 16, "--max-lora-rank is 16 unless it is set"
    assert (config.get("modules_to_save"), config["bias"]) == (None, "none")
    unknown = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    assert not [name for name in unknown if config.get(name)]
    assert not isinstance(config.get("init_lora_weights", True), str)
    weights = read_tensors(adapter / "adapter_model.safetensors")
    shape = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
    parts = [match.groups() if (match := shape.fullmatch(name)) else (name, "?") for name in weights]
    assert {part for _, part in parts} == {"A", "B"}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert {module.rpartition(".")[2] for module, _ in parts} <= linear
    assert sorted(module for module, part in parts if part == "A") == sorted(m for m, part in parts if part == "B")
    for name, value in weights.items():
        assert value.shape[name.endswith("lora_B.weight")] == config["r"]
    # What PEFT makes of the same file is what vLLM's fields mean.
    known = pytest.importorskip("peft").LoraConfig.from_pretrained(str(adapter))
    assert (known.r, known.lora_alpha) == (config["r"], config["lora_alpha"])
    assert not known.use_dora
    assert not known.lora_bias
    if find_spec("vllm") is not None:
        from vllm.config.lora import LoRAConfig
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

        helper = PEFTHelper.from_local_dir(str(adapter), None)
        helper.validate_legal(LoRAConfig())
        assert (helper.r, helper.lora_alpha) == (known.r, known.lora_alpha)
        resolver = FilesystemResolver(str(adapter.parent))
        asked = asyncio.run(resolver.resolve_lora(config["base_model_name_or_path"], adapter.name))
        assert Path(asked.lora_path) == adapter
        assert asked.lora_name == adapter.name


def test_an_adapter_of_some_tokens_alone_is_not_exported_for_vllm(full_store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"activated LoRA.*adapter\.active_tokens=null"):
        invoke("export", full_store.location, "--vllm", "--out", tmp_path / "lora")


def test_a_name_for_vllm_changes_with_the_adapter_and_with_nothing_else(
    whole_store: AdapterStore, whole: MetaRecommender, tmp_path: Path
) -> None:
    before = export_adapters(whole_store, tmp_path / "one")
    assert export_adapters(whole_store, tmp_path / "two") == before
    whole_store.append([Feedback("bob", (("m9", 5.0),))])
    Engine(whole, whole_store).people(["bob"])
    after = export_adapters(whole_store, tmp_path / "one")
    assert {user for user in before if before[user] != after[user]} == {"bob"}
    assert before["bob"].partition("-")[0] == after["bob"].partition("-")[0]
    # The same version of a user, of a recommender that was trained again.
    profile = whole_store.profile("bob")
    assert profile is not None
    changed = whole.adapt([("m9", 5.0)])
    record = whole_store.records(profile.key)[0]
    shutil.rmtree(whole_store.path(record))
    whole_store.put([NewAdapter(profile.key, record.version, "another", partial(changed.save, whole=False))])
    assert export_adapters(whole_store, tmp_path / "one")["bob"] != after["bob"]


def test_other_addresses_need_keys_and_keys_are_shown_once(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        invoke("serve", "--checkpoint", checkpoint, "--host", "0.0.0.0")
    made = facts("api-key", tmp_path / "keys", "--name", "shop")
    facts("api-key", tmp_path / "keys", "--name", "other")
    assert [key.name for key in read_keys(tmp_path / "keys")] == ["shop", "other"]
    assert made["key"] not in (tmp_path / "keys").read_text()
    with pytest.raises(ConfigError, match="has a key named"):
        invoke("api-key", tmp_path / "keys", "--name", "shop")
    with pytest.raises(ConfigError, match="not plain"):
        invoke("api-key", tmp_path / "keys", "--name", "a b")
    assert invoke("api-key", tmp_path / "keys", "--name", "late", "--days", "1e12").exit_code == 2


def test_a_key_is_added_in_place_so_that_comments_and_mounts_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# whose is whose")
    before = file.stat().st_ino
    facts("api-key", file, "--name", "shop")
    facts("api-key", file, "--name", "other")
    assert file.read_text().startswith("# whose is whose\nshop ")
    assert [key.name for key in read_keys(file)] == ["shop", "other"]
    assert file.stat().st_ino == before


def test_without_the_extra_serve_says_what_to_install(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarec\[serve\]'"):
        invoke("serve", "--checkpoint", checkpoint)


def run(part: str, checkpoint: Path, out: Path, *options: str) -> Any:
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), part, "--checkpoint", str(checkpoint)]
    done = subprocess.run([*command, "--out", str(out), "--threads", "1", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())[part]


def test_every_acknowledged_rating_survives_kills_exactly_once(checkpoint: Path, tmp_path: Path) -> None:
    found = run("kills", checkpoint, tmp_path / "out.json", "--kills", "2")
    assert found["acknowledged"] >= 24
    assert (found["lost"], found["doubled"], found["damaged_adapters"]) == (0, 0, 0)
    assert found["seconds_to_stop"] < 10


def start(checkpoint: Path, store: Path | str, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "metarec.cli", "serve", "--checkpoint", str(checkpoint), "--store", str(store)]
    process = subprocess.Popen(
        [*command, "--port", "0", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        if running := re.search(r"Uvicorn running on (http://[\w.:]+)", line):
            return process, running[1]
        lines.append(line)
    raise AssertionError("the server did not start:\n" + "".join(lines))


def ask(url: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    facts = {"Content-Type": "application/json", **(headers or {})}
    asked = urllib.request.Request(url, content, facts, method=method)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.loads(answer.read())


def test_a_terminated_server_has_everything_it_accepted_and_logs_nobody(checkpoint: Path, tmp_path: Path) -> None:
    process, url = start(checkpoint, tmp_path / "store", "--threads", "1")
    said = [ask(f"{url}/v1/users/secret-user/feedback", {"item": item, "rating": r}) for item, r in LOVES_DRAMA]
    assert [answer["adapter"]["version"] for answer in said] == [1, 2, 3, 4, 5]
    with pytest.raises(urllib.error.HTTPError, match="422"):
        ask(f"{url}/v1/users/secret-user/feedback", {"item": "secret-item", "rating": 1})
    process.terminate()
    log, _ = process.communicate(timeout=10)
    assert "secret" not in log
    assert all(json.loads(line)["at"] for line in log.splitlines())
    store = AdapterStore(tmp_path / "store", create=False)
    assert [(event.item, event.rating) for event in store.events("secret-user")] == list(LOVES_DRAMA)
    profile = store.profile("secret-user")
    assert profile is not None
    assert store.newest(profile.key, store.records(profile.key)[0].recommender)[0].version == 5  # type: ignore[union-attr]


def test_three_servers_over_postgresql_one_of_them_killed_serve_and_erase_the_same_users(
    checkpoint: Path, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one is told all know at once, export and erase, from files, logs and memory.

    The third is killed, misses an erasure, and comes back.
    """
    ann, bob = "CANARY-ann-7f3a", "CANARY-bob-91cc"
    # The C library overwrites what is freed, so that what memory holds is what the process holds.
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    monkeypatch.setenv("MALLOC_PERTURB_", "165")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")

    def start_one(number: int) -> tuple[subprocess.Popen[str], str]:
        return start(checkpoint, postgres, "--adapters", str(tmp_path / f"adapters{number}"), "--threads", "1")

    with ThreadPoolExecutor() as starting:
        servers = list(starting.map(start_one, range(3)))
    try:
        one, two, three = (url for _, url in servers)
        key = {"Idempotency-Key": "CANARY-request"}
        for user, said in ((ann, LOVES_DRAMA), (bob, LOVES_HORROR)):
            ratings = [{"item": item, "rating": rating} for item, rating in said]
            told = ask(f"{one}/v1/users/{user}/feedback", {"ratings": ratings}, headers=key)
            assert told["adapter"] == {"version": 5, "ratings": 5, "diverged": False, "stale": False}
            # The other server's answer to the same request is the first one's.
            assert ask(f"{two}/v1/users/{user}/feedback", {"ratings": ratings}, headers=key)["replayed"]
        ranked = [ask(f"{url}/v1/users/{ann}/recommendations?k=5") for url in (one, two)]
        assert ranked[0] == ranked[1]
        assert ranked[0]["items"] != ask(f"{two}/v1/users/{bob}/recommendations?k=5")["items"]
        assert ask(f"{two}/v1/users/{ann}/feedback", {"item": "m9", "rating": 1.0})["adapter"]["version"] == 6
        assert ask(f"{one}/v1/users/{ann}/recommendations")["adapter"]["version"] == 6
        assert ask(f"{three}/v1/users/{ann}/recommendations?k=5")["adapter"]["version"] == 6
        servers[2][0].kill()
        servers[2][0].wait(10)
        assert ask(f"{two}/v1/users/{ann}/feedback", {"item": "m8", "rating": 1.0})["adapter"]["version"] == 7
        ranked = [ask(f"{url}/v1/users/{ann}/recommendations?k=5") for url in (one, two)]
        assert ranked[0] == ranked[1]
        exported = [ask(f"{url}/v1/users/{ann}")["ratings"] for url in (one, two)]
        assert exported[0] == exported[1]
        assert [said["item"] for said in exported[0]] == [*(item for item, _ in LOVES_DRAMA), "m9", "m8"]
        database = Path(postgres.partition("host=")[2]) / "data"
        assert where(ann, database, servers[:2]), "otherwise nothing is looked at"
        ask(f"{one}/v1/users/{ann}", method="DELETE")
        servers[2][0].communicate()
        servers[2] = start_one(2)
        one, two, three = (url for _, url in servers)
        for url in (one, two, three):
            assert ask(f"{url}/v1/users/{bob}/recommendations")["adapter"]["version"] == 5
        assert len({path.name.strip(".").split("-")[0] for path in tmp_path.glob("adapters*/*/*-*")}) == 1
        deadline = time.monotonic() + 20
        while (left := where(ann, database, servers)) and time.monotonic() < deadline:
            time.sleep(0.5)  # garbage is collected when a server is idle
        assert not left
        assert where(bob, database, servers)
        for url in (one, two, three):
            assert ask(f"{url}/v1/users/{ann}/recommendations")["adapter"]["version"] == 0
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask(f"{url}/v1/users/{ann}")
    finally:
        for process, _ in servers:
            process.terminate()
        logs = [process.communicate(timeout=20)[0] for process, _ in servers]
    assert not any(user in log for log in logs for user in (ann, bob))


def where(text: str, folder: Path, servers: Sequence[tuple[subprocess.Popen[str], str]]) -> list[str]:
    """Returns the files, and the parts of the servers' memory, that hold a text."""
    found = [str(file) for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]
    for process, _ in servers:
        with Path(f"/proc/{process.pid}/maps").open() as maps, Path(f"/proc/{process.pid}/mem").open("rb") as memory:
            for line in maps:
                area, access, *_, name = line.split(maxsplit=5)
                begin, end = (int(place, 16) for place in area.split("-"))
                if access.startswith("rw") and not name.startswith("/") and "[v" not in name:
                    memory.seek(begin)
                    content = memory.read(end - begin)
                    places = [match.start() for match in re.finditer(text.encode(), content)]
                    found += [f"{process.pid} {content[place - 60 : place + 60]!r}" for place in places]
    return found


def test_schemathesis_finds_no_5xx(recommender: MetaRecommender, tmp_path: Path) -> None:
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis")
    if command is None:
        pytest.skip("schemathesis is not installed (pip install schemathesis)")
    application = create_app(Engine(recommender, AdapterStore(tmp_path / "store")), ServeSettings())
    with listening(application) as url:
        options = ["--checks", "not_a_server_error", "--max-examples", "10", "--phases", "fuzzing", "--seed", "0"]
        done = subprocess.run(
            [command, "run", f"{url}/openapi.json", *options], capture_output=True, text=True, cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_log_format_keeps_exceptions_text_out() -> None:
    from metarec.serve.guard import JsonLines

    record = logging.LogRecord("x", logging.INFO, "f", 1, "hello %s", ("there",), None)
    record.user = "ann"
    assert json.loads(JsonLines().format(record)).keys() == {"at", "level", "logger", "event"}
