"""The service under load, under fire and over time.

    python benchmarks/serve.py PART --checkpoint runs/x

latency    feedback to new ranking over 1,000 items, with 1 and with 32 clients
bulk       users adapted per second
overload   twice the load that it can take: 429, and healthy
kills      8 clients writing while the server is killed 20 times
memory     resident memory over 100,000 adapters; use a tiny model and --users 100000
retrieval  what the two-stage ranking misses of the exhaustive one
ratios     explained to plain rankings, eight clients to one, a long history to a short one, in one run
judging    feedback that judges the model to feedback that does not, in one run
restart    processor seconds and memory until the service is ready, from nothing and again
million    a ranking of a million made items that are scored without a language model, and the server's peak memory
stream     warm start against the meta-initialization, for quality and for forgetting

Each writes its part of ``benchmarks/results/serve.json``, and what another commit had there under ``before``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "serve.json"


class Server:
    """`metarec serve` in a process of its own."""

    def __init__(self, checkpoint: Path, store: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "metarec.cli", "serve", "--checkpoint", str(checkpoint), "--store", str(store)]
        command += ["--port", str(self.port), "--rate", "0", *options]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def wait(self, seconds: float = 3000) -> Server:
        """Returns once it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.log.seek(0)
                raise RuntimeError(self.log.read().decode()[-2000:])
            try:
                if self.ask("GET", "/readyz")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the server did not become ready")

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Returns the status and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            text = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(text) if is_json else text.decode()
        finally:
            connection.close()

    def stop(self, how: int = signal.SIGTERM) -> float:
        """Returns how many seconds it took to go."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(60)
        self.log.close()
        return time.monotonic() - began


@contextmanager
def serving(checkpoint: Path, *options: str) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        server = Server(checkpoint, Path(scratch) / "store", *options)
        try:
            yield server.wait()
        finally:
            server.stop()


def smaller(checkpoint: Path, items: int, out: Path) -> Path:
    """Saves the recommender over its most rated items alone."""
    from metarec.cli.runs import load_run
    from metarec.data.interactions import Catalog
    from metarec.recommender import MetaRecommender
    from metarec.scorers.collaborative.terms import CollaborativeTerm, ItemMeanTerm
    from metarec.scorers.language.prompt_term import PromptTerm
    from metarec.training.fitting import catalog_answer_model

    full = load_run(checkpoint)
    fitted = full.fitted
    if len(fitted.catalog) <= items:
        return checkpoint
    chosen = np.sort(np.argsort(-fitted.prior.count, kind="stable")[:items])
    fields = {name: tuple(column[code] for code in chosen) for name, column in fitted.catalog.fields.items()}
    catalog = Catalog(tuple(fitted.catalog.ids[code] for code in chosen), fields)
    columns = {name: getattr(fitted.prior, name)[chosen] for name in ("total", "count", "centre")}
    answer_model = catalog_answer_model(full.backbone, full.config, fitted.task.template, catalog)
    _ = answer_model.states
    prior = replace(fitted.prior, **columns)
    stack = fitted.terms["collaborative"].stack
    members = tuple(of_items(member, chosen, prior) for member in stack.members)
    terms = {
        "item mean": ItemMeanTerm(prior),
        "collaborative": CollaborativeTerm(replace(stack, prior=prior, members=members)),
        "prompt": PromptTerm(answer_model),
    }
    less = replace(fitted, catalog=catalog, prior=prior, terms=terms, answer_model=answer_model)
    MetaRecommender(full.backbone, full.config, less).save_pretrained(out)
    return out


def of_items(member: Any, chosen: np.ndarray, prior: Any) -> Any:
    """Returns a member of the stack for some items alone."""
    if hasattr(member, "loadings"):
        return replace(member, **{name: getattr(member, name)[chosen] for name in ("mean", "loadings", "noise")})
    return replace(member, prior=prior, vectors=member.vectors[chosen])


def item_ids(checkpoint: Path) -> list[str]:
    model = checkpoint / "model" if (checkpoint / "model").is_dir() else checkpoint
    return list(json.loads((model / "catalog.json").read_text())["ids"])


def closed_loop(server: Server, ids: list[str], clients: int, rounds: int) -> dict[str, float]:
    """Every client says what it thinks of one item and asks for the new ranking; after ten, somebody new begins."""
    taken: list[float] = []

    def client(number: int) -> None:
        generator = np.random.default_rng(number)
        for turn, item in enumerate(generator.choice(len(ids), rounds, replace=False)):
            user = f"c{clients}-{number}-{turn // 10}"
            began = time.perf_counter()
            said = {"item": ids[item], "rating": float(generator.integers(1, 6))}
            first, _ = server.ask("POST", f"/v1/users/{user}/feedback", said)
            second, _ = server.ask("GET", f"/v1/users/{user}/recommendations?k=10")
            if (first, second) == (200, 200):
                taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    milliseconds = 1000 * np.array(taken)
    return {
        "clients": clients,
        "rounds": len(taken),
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 1),
        "p99_ms": round(float(np.percentile(milliseconds, 99)), 1),
        "rounds_per_second": round(len(taken) / seconds, 2),
    }


def latency(arguments: argparse.Namespace) -> dict[str, Any]:
    ids = item_ids(arguments.checkpoint)
    with serving(arguments.checkpoint, "--threads", str(arguments.threads)) as server:
        closed_loop(server, ids, 2, 3)
        runs = [
            closed_loop(server, ids, clients, max(5, arguments.rounds // clients)) for clients in (1, arguments.clients)
        ]
    return {"items": len(ids), "runs": runs, "bar": "p50 <= 150 ms for one client on 2 cores"}


def ratios(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios within one run, which hold on a machine that others use too."""
    ids = item_ids(arguments.checkpoint)
    generator = np.random.default_rng(0)

    def rate(server: Server, user: str, count: int) -> None:
        for start in range(0, count, 100):
            chosen = generator.choice(len(ids), min(100, count - start))
            said = [{"item": ids[item], "rating": float(generator.integers(1, 6))} for item in chosen]
            server.ask("POST", f"/v1/users/{user}/feedback", {"ratings": said})

    def seconds(ask: Any) -> float:
        taken = []
        for turn in range(arguments.rounds):
            began = time.perf_counter()
            ask(turn)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def rankings(server: Server, clients: int) -> float:
        def client(number: int) -> None:
            for _ in range(arguments.rounds):
                server.ask("GET", f"/v1/users/reader{number}/recommendations?k=10")

        began = time.perf_counter()
        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return clients * arguments.rounds / (time.perf_counter() - began)

    with serving(arguments.checkpoint, "--threads", str(arguments.threads)) as server:
        for number in range(16):
            rate(server, f"reader{number}", 20)
        found: dict[str, Any] = {}
        for count in (20, 64):
            rate(server, f"rated{count}", count)
            address = f"/v1/users/rated{count}/recommendations?k=50"
            server.ask("GET", address + "&explain=true")
            plain = seconds(lambda _, address=address: server.ask("GET", address))
            explained = seconds(lambda _, address=address: server.ask("GET", address + "&explain=true"))
            found[f"explained_to_plain_of_{count}_ratings"] = round(explained / plain, 2)
        rankings(server, 8)
        rates: dict[int, list[float]] = {1: [], 8: [], 16: []}
        processor: dict[int, list[float]] = {1: [], 8: [], 16: []}
        for _ in range(3):  # other processes come and go: the median of three, each measured beside the others
            for clients in rates:
                before = cpu_seconds(server)
                rates[clients].append(rankings(server, clients))
                processor[clients].append((cpu_seconds(server) - before) / (clients * arguments.rounds))
        for name, clients in (("eight", 8), ("sixteen", 16)):
            shares = [many / one for many, one in zip(rates[clients], rates[1], strict=True)]
            found[f"{name}_clients_to_one"] = round(statistics.median(shares), 2)
            found[f"{name}_clients_to_one_each_time"] = [round(share, 2) for share in shares]
        found["cpu_ms_a_ranking"] = {
            str(clients): round(1000 * statistics.median(spent), 1) for clients, spent in processor.items()
        }
        events = {"short": 64, "long": 10_000}
        for user, count in events.items():
            rate(server, user, count)
        adapting = {
            user: seconds(
                lambda turn, user=user: server.ask(
                    "POST", f"/v1/users/{user}/feedback", {"item": ids[turn], "rating": 4.0}
                )
            )
            for user in events
        }
        found["feedback_after_10000_ratings_to_after_64"] = round(adapting["long"] / adapting["short"], 2)
    return {"items": len(ids), **found}


def judging(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratings one after another, each judged before it is used and not: two servers, in turn."""
    ids = item_ids(arguments.checkpoint)
    options = ("--threads", str(arguments.threads), "--watch")
    with (
        serving(arguments.checkpoint, *options, "1") as judged,
        serving(arguments.checkpoint, *options, "0") as plain,
    ):
        servers = {"judged": judged, "not judged": plain}
        seconds: dict[str, list[float]] = {name: [] for name in servers}
        processor: dict[str, list[float]] = {name: [] for name in servers}
        for turn in range(6):  # the first one is no part of the result
            for name, server in servers.items():
                items = np.random.default_rng(turn).choice(len(ids), arguments.rounds, replace=False)
                before, began = cpu_seconds(server), time.perf_counter()
                for place, item in enumerate(items):
                    said = {"item": ids[item], "rating": float(1 + item % 5)}
                    status, _ = server.ask("POST", f"/v1/users/j{turn}-{place // 20}/feedback", said)
                    assert status == 200
                server.ask("GET", "/v1/search?q=a")  # what is done after an answer is done when the next one comes
                seconds[name].append((time.perf_counter() - began) / arguments.rounds)
                processor[name].append((cpu_seconds(server) - before) / arguments.rounds)
        metrics = judged.ask("GET", "/metrics")[1]
    pairs = zip(seconds["judged"][1:], seconds["not judged"][1:], strict=True)
    each_time = [one / other for one, other in pairs]
    counted = re.findall(r"^metarec_judged_ratings_total\{.*\} ([\d.]+)", metrics, re.M)
    return {
        "items": len(ids),
        "ratings": 6 * arguments.rounds,
        "ratings_judged": round(sum(map(float, counted))),
        "judged_to_not": round(statistics.median(each_time), 2),
        "judged_to_not_each_time": [round(value, 2) for value in each_time],
        "cpu_ms_a_rating": {name: round(1000 * statistics.median(values[1:]), 1) for name, values in processor.items()},
    }


def restart(arguments: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds and memory of a server when it is ready; the second start reads what the first kept."""
    found, resident = [], []
    shutil.rmtree(arguments.checkpoint / "warm", ignore_errors=True)
    for _ in range(2):
        with serving(arguments.checkpoint, "--threads", str(arguments.threads)) as server:
            found.append(round(cpu_seconds(server), 1))
            resident.append(memory_gib(server, "VmRSS"))
    items = len(item_ids(arguments.checkpoint))
    return {
        "items": items,
        "cpu_seconds_first": found[0],
        "cpu_seconds_again": found[1],
        "resident_gib_first": resident[0],
        "resident_gib_again": resident[1],
        "bar": "<= 10 s of processor time",
    }


def made_catalog(checkpoint: Path, items: int, out: Path) -> None:
    """Saves a recommender of so many made items: the run's settings and weights, and no language model."""
    from retrieval_index import made

    from metarec.cli.runs import load_run
    from metarec.data.interactions import Catalog
    from metarec.meta.inner_loop import MetaState
    from metarec.recommender import MetaRecommender
    from metarec.scorers.collaborative.terms import CollaborativeTerm, ItemMeanTerm

    full = load_run(checkpoint)
    stack, fitted, meta = made(items), full.fitted, full.fitted.meta
    fields = {name: tuple(f"{name} {code}" for code in range(items)) for name in fitted.catalog.fields}
    kept = ("score.item mean", "score.collaborative")
    init = {name: value for name, value in meta.init.items() if name in kept}
    less = replace(
        fitted,
        catalog=Catalog(tuple(map(str, range(items))), fields),
        prior=stack.prior,
        terms={"item mean": ItemMeanTerm(stack.prior), "collaborative": CollaborativeTerm(stack)},
        meta=MetaState(init, {name: value for name, value in meta.log_rate.items() if name in init}),
        answer_model=None,
    )
    features = full.config.collaborative.model_copy(update={"features": ("fields",)})
    settings = {"score": ("item mean", "collaborative"), "collaborative": features}
    MetaRecommender(None, full.config.model_copy(update=settings), less).save_pretrained(out)


def cpu_seconds(server: Server) -> float:
    spent = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")


def memory_gib(server: Server, name: str) -> float:
    """Returns a line of the process's status: VmRSS is what it holds, VmHWM the most that it ever held."""
    facts = Path(f"/proc/{server.process.pid}/status").read_text()
    return round(next(int(line.split()[1]) for line in facts.splitlines() if line.startswith(name)) / 2**20, 2)


def million(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        made_catalog(arguments.checkpoint, arguments.catalog, Path(scratch) / "model")
        with serving(Path(scratch) / "model", "--threads", str(arguments.threads)) as server:
            ready = cpu_seconds(server)
            said = [{"item": str(item), "rating": float(1 + item % 5)} for item in range(0, 2000, 100)]
            server.ask("POST", "/v1/users/reader/feedback", {"ratings": said})
            taken = []
            address = "/v1/users/reader/recommendations?k=50"
            server.ask("GET", address)
            before = cpu_seconds(server)
            for _ in range(arguments.rounds):
                began = time.perf_counter()
                status, answer = server.ask("GET", address)
                taken.append(time.perf_counter() - began)
                assert (status, len(answer["items"])) == (200, 50), answer
            spent = (cpu_seconds(server) - before) / arguments.rounds
            peak = memory_gib(server, "VmHWM")
    return {
        "items": arguments.catalog,
        "p50_ms": round(1000 * statistics.median(taken), 1),
        "cpu_ms_a_ranking": round(1000 * spent, 1),
        "cpu_seconds_to_ready": round(ready, 1),
        "peak_gib": peak,
        "bar": "p50 <= 200 ms in <= 6 GiB",
    }


def bulk(arguments: argparse.Namespace) -> dict[str, Any]:
    from metarec.cli.runs import load_run
    from metarec.serve.batching import BULK_USERS_AT_ONCE, use_one_thread_per_batch
    from metarec.serve.bulk import adapt_users, bulk_feedback
    from metarec.serve.engine import Engine
    from metarec.serve.store import AdapterStore

    recommender = load_run(arguments.checkpoint)
    generator = np.random.default_rng(0)
    ids = recommender.fitted.catalog.ids
    rated = [generator.choice(len(ids), arguments.ratings, replace=False) for _ in range(arguments.users)]
    users = {
        f"u{number}": bulk_feedback(f"u{number}", [(ids[item], float(generator.integers(1, 6))) for item in items])
        for number, items in enumerate(rated)
    }
    # Items are read once for all users that will ever come: no part of what a user costs.
    if recommender.fitted.answer_model is not None:
        recommender.fitted.answer_model.read(np.unique(np.concatenate(rated)))
    with tempfile.TemporaryDirectory() as scratch:
        store = AdapterStore(Path(scratch))
        workers = use_one_thread_per_batch(arguments.threads)
        engine = Engine(recommender, store, hot_bytes=0, users_at_once=BULK_USERS_AT_ONCE, workers=workers)
        adapt_users(engine, dict(list(users.items())[:8]))
        began, before = time.perf_counter(), time.process_time()
        done = adapt_users(engine, users)
        seconds, spent = time.perf_counter() - began, time.process_time() - before
    return {
        "users": len(users),
        "ratings_each": arguments.ratings,
        "users_per_second": round(done.adapted / seconds, 1),
        "cpu_ms_a_user": round(1000 * spent / done.adapted, 1),
        "bar": ">= 50 a second",
    }


def overload(arguments: argparse.Namespace) -> dict[str, Any]:
    ids = item_ids(arguments.checkpoint)
    with serving(arguments.checkpoint, "--threads", str(arguments.threads), "--waiting", "16") as server:
        capacity = closed_loop(server, ids, 8, arguments.rounds)["rounds_per_second"]
        interval = 1 / (2 * capacity)
        statuses: list[int] = []
        health: list[int] = []

        def visit(number: int) -> None:
            said = {"item": ids[number % len(ids)], "rating": 4.0}
            statuses.append(server.ask("POST", f"/v1/users/o{number}/feedback", said)[0])
            statuses.append(server.ask("GET", f"/v1/users/o{number}/recommendations?k=10")[0])

        threads = []
        for number in range(min(int(arguments.seconds / interval), 4000)):
            threads.append(threading.Thread(target=visit, args=(number,)))
            threads[-1].start()
            if number % 10 == 0:
                health.append(server.ask("GET", "/healthz")[0])
            time.sleep(interval)
        for thread in threads:
            thread.join()
        after = closed_loop(server, ids, 1, 5)
    return {
        "capacity_rounds_per_second": capacity,
        "offered_rounds_per_second": 2 * capacity,
        "answers": {str(status): statuses.count(status) for status in sorted(set(statuses))},
        "health": {str(status): health.count(status) for status in sorted(set(health))},
        "p50_ms_after": after["p50_ms"],
    }


def kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writers repeat a request with the same key until it is acknowledged; killed servers are started again."""
    ids = item_ids(arguments.checkpoint)
    acknowledged: list[tuple[str, str, int]] = []
    stopping = threading.Event()
    with tempfile.TemporaryDirectory() as scratch:
        holder = [Server(arguments.checkpoint, Path(scratch) / "store").wait()]

        def writer(number: int) -> None:
            for count in range(10**9):
                if stopping.is_set():
                    return
                user, key = f"writer{number % 3}", f"w{number}n{count}"
                said = {"item": ids[count % len(ids)], "rating": 1.0 + number % 5}
                while not stopping.is_set():
                    try:
                        status, answer = holder[0].ask(
                            "POST", f"/v1/users/{user}/feedback", said, **{"Idempotency-Key": key}
                        )
                    except (OSError, http.client.HTTPException, ValueError):
                        time.sleep(0.05)
                        continue
                    if status == 200:
                        acknowledged.append((user, key, answer["adapter"]["version"]))
                        break
                    time.sleep(0.05)

        threads = [threading.Thread(target=writer, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        generator = np.random.default_rng(0)
        for _ in range(arguments.kills):
            before = len(acknowledged)
            while len(acknowledged) < before + 8:
                time.sleep(0.01)
            time.sleep(float(generator.uniform(0, 0.3)))
            holder[0].stop(signal.SIGKILL)
            holder[0] = Server(arguments.checkpoint, Path(scratch) / "store").wait()
        before = len(acknowledged)
        while len(acknowledged) < before + 8:
            time.sleep(0.01)
        stopping.set()
        for thread in threads:
            thread.join()
        logged = sum(len(holder[0].ask("GET", f"/v1/users/writer{number}")[1]["ratings"]) for number in range(3))
        seconds = holder[0].stop()
        from metarec.serve.store import AdapterStore

        store = AdapterStore(Path(scratch) / "store", create=False)
        keys = [key for (key,) in store._index.execute("SELECT idempotency_key FROM requests")]
        damaged = [record for _, record in store.verify_all() if record is not None]
    said = [key for _, key, _ in acknowledged]
    return {
        "kills": arguments.kills,
        "writers": 8,
        "acknowledged": len(said),
        "lost": len(set(said) - set(keys)),
        # A request that was in flight when the writers stopped may be in the log without having been acknowledged.
        "doubled": logged - len(set(keys)),
        "damaged_adapters": len(damaged),
        "seconds_to_stop": round(seconds, 2),
    }


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from metarec.cli.runs import load_run
    from metarec.serve.bulk import adapt_users, bulk_feedback
    from metarec.serve.engine import Engine
    from metarec.serve.store import AdapterStore

    torch.set_num_threads(arguments.threads)
    recommender = load_run(arguments.checkpoint)
    ids = recommender.fitted.catalog.ids
    generator = np.random.default_rng(0)
    shared = Path("/dev/shm")  # where there is memory instead of a disk, writing takes no time of its own
    samples = []
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as scratch:
        engine = Engine(recommender, AdapterStore(Path(scratch)), hot_bytes=4 << 20)
        block = max(1, arguments.users // 10)
        for start in range(0, arguments.users, block):
            users = {
                f"u{number}": bulk_feedback(
                    f"u{number}", [(ids[item], 4.0) for item in generator.choice(len(ids), 5, replace=False)]
                )
                for number in range(start, start + block)
            }
            adapt_users(engine, users)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            samples.append({"adapters": start + block, "resident_mib": round(resident / 2**20, 1)})
        sizes = engine.store.sizes()
        hot = engine.hot.bytes
    return {"samples": samples, "adapters_kept": sizes["adapters"], "bytes_on_disk": sizes["bytes"], "hot_bytes": hot}


def retrieval(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from metarec.cli.runs import load_run
    from metarec.serve.engine import Engine
    from metarec.serve.person import Person
    from metarec.serve.store import AdapterStore

    torch.set_num_threads(arguments.threads)
    recommender = load_run(arguments.checkpoint)
    episodes = recommender.task_data().episodes("test")[0][: arguments.users]
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(recommender, AdapterStore(Path(scratch)))
        overlaps: dict[str, list[float]] = {"two stages": [], "prior alone": []}
        supports = [episode.support.head(arguments.ratings) for episode in episodes]
        began = time.perf_counter()
        engine.prepare()
        prepared = time.perf_counter() - began
        for adapted, _ in engine.adapt(supports):
            person = Person(adapted, 1, 1)
            codes = np.setdiff1d(np.arange(len(engine.catalog)), adapted.support.items)
            exact = set(codes[np.argsort(-adapted.scores(codes).numpy(), kind="stable")[:10]])
            overlaps["two stages"].append(len(exact & set(engine.retrieve(person, 10))) / 10)
            by_prior = codes[np.argsort(-engine._retrieval.new_user_scores[codes], kind="stable")[: engine._candidates]]
            overlaps["prior alone"].append(len(exact & set(by_prior)) / 10)
    return {
        "items": len(engine.catalog),
        "candidates": engine._candidates,
        "seconds_to_prepare": round(prepared, 1),
        "users": len(episodes),
        "share_of_the_exhaustive_top_ten": {
            name: round(statistics.mean(values), 4) for name, values in overlaps.items()
        },
    }


def stream(arguments: argparse.Namespace) -> dict[str, Any]:
    """Feedback comes five ratings at a time: adapt the last adapter further, or start again from all ratings."""
    import torch

    from metarec.cli.runs import load_run
    from metarec.data.interactions import Ratings
    from metarec.evaluation.metrics import auc, bootstrap_interval
    from metarec.scorers.language.score import rated_batch, score_adapted, support_loss
    from metarec.system.tensors import expand_users, select_user

    torch.set_num_threads(arguments.threads)
    recommender = load_run(arguments.checkpoint)
    fitted, scorer = recommender.fitted, recommender.scorer()
    episodes = [episode for episode in recommender.task_data().episodes("test")[0] if len(episode.support) >= 20][
        : arguments.users
    ]
    quality: dict[str, list[float]] = {}
    forgetting: dict[str, list[float]] = {}
    for episode in episodes:
        support, query = episode.support.head(20), episode.query
        labels = query.values >= fitted.task.like_threshold
        if labels.all() or not labels.any():
            continue
        model = recommender.adapted_model
        first = rated_batch([support.head(5)], fitted.terms, fitted.prior, model, fitted.task.like_threshold)
        early = support_loss(
            first,
            model,
            shrinkage=scorer.inner.shrinkage,
            user_bias_damping=scorer.inner.user_bias_damping,
        )
        state = fitted.meta.init
        for name in ("warm start, new ratings", "warm start, all ratings", "meta-initialization, all ratings"):
            state = fitted.meta.init
            for stop in (5, 10, 15, 20):
                seen = slice(stop - 5 if name.endswith("new ratings") else 0, stop)
                part = Ratings(support.items[seen], support.values[seen])
                start = fitted.meta.init if name.startswith("meta") else state
                state = select_user(replace(scorer, meta=replace(fitted.meta, init=start)).adapt([part]).state, 0)
            with torch.no_grad():
                one = expand_users(state, 1)
                found = score_adapted(one, [support], [query.items], fitted.terms, fitted.prior, model)
                values = found[0].numpy()
                quality.setdefault(name, []).append(auc(values, labels) or 0.0)
                forgetting.setdefault(name, []).append(float(early(expand_users(state, 1))[0]))
    base = np.array(quality["meta-initialization, all ratings"])
    gains = {name: np.array(values) - base for name, values in quality.items()}
    intervals = {name: [float(gain.mean()), *bootstrap_interval(gain, 0)] for name, gain in gains.items()}
    return {
        "users": len(base),
        "ratings": "20, five at a time",
        "auc": {name: round(float(np.mean(values)), 4) for name, values in quality.items()},
        "auc_minus_default": {name: [round(value, 4) for value in values] for name, values in intervals.items()},
        "loss_on_the_first_five_at_the_end": {
            name: round(float(np.mean(values)), 4) for name, values in forgetting.items()
        },
    }


OVER_FEWER_ITEMS = ("latency", "ratios", "judging", "restart", "overload", "kills")
PARTS = {
    part.__name__: part
    for part in (latency, ratios, judging, restart, million, bulk, overload, kills, memory, retrieval, stream)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--items", type=int, default=1000, help=f"the most rated ones; {', '.join(OVER_FEWER_ITEMS)}")
    parser.add_argument("--catalog", type=int, default=1_000_000, help="made items of the part 'million'")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--ratings", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--name", help="of the result in the file; the part's, unless it is measured in several ways")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    from metarec.files.artifacts import write_json

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    facts = {
        "commit": git.stdout.strip(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_before": round(os.getloadavg()[0], 2),
    }
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.part in OVER_FEWER_ITEMS:
            arguments.checkpoint = smaller(arguments.checkpoint, arguments.items, Path(scratch) / "model")
        result = {**PARTS[arguments.part](arguments), **facts}
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    name = arguments.name or arguments.part
    earlier = kept.get(name, {})
    if earlier and earlier.get("commit") != result["commit"]:
        result["before"] = {name: value for name, value in earlier.items() if name != "before"}
    elif "before" in earlier:
        result["before"] = earlier["before"]
    print(json.dumps(result, indent=2))
    write_json(arguments.out, {**kept, name: result})


if __name__ == "__main__":
    main()
