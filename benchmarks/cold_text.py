"""What text tells of movies that nobody rated: AUC at K = 0 of item-cold users, by what is read and how.

    python benchmarks/cold_text.py --first 20 --seeds 6      # benchmarks/results/cold-text.json

Item means of meta-training users are regressed on text; validation and test users of every split are asked about unseen
movies. It says how much there is to be had, on splits that no table reports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from metarec.bench.context import MethodContext
from metarec.data.task_data import load_task_data
from metarec.data.task_files import load_task
from metarec.data.templates import review_sentence
from metarec.evaluation.metrics import auc
from metarec.files.artifacts import write_json
from metarec.scorers.collaborative.features import Features, state_vectors, unrated_features
from metarec.scorers.collaborative.item_mean import predict_unrated, smooth_by_text
from metarec.scorers.collaborative.residuals import Floats
from metarec.scorers.language.item_vectors import hidden_state_vectors
from metarec.system.doctor import environment
from metarec.system.progress import progress

RESULT = Path(__file__).parent / "results" / "cold-text.json"
TASK = "movielens/item-cold"
_PROMPT = load_task(TASK).prompt
_MOVIE_REVIEW, _STORY = _PROMPT.hidden_states
# What the language model reads for its middle layers' states.
SENTENCES = {
    "both": (_MOVIE_REVIEW, _STORY),
    "movie review": (_MOVIE_REVIEW,),
    "story": (_STORY,),
    "review": (review_sentence(_PROMPT.text),),
    "nothing more": ("{{ title }} ({{ year }}), {{ genres }}",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=20, help="the first split seed")
    parser.add_argument("--seeds", type=int, default=6, help="how many split seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with progress("splits", arguments.seeds) as advance:
        for done in range(arguments.seeds):
            seed = arguments.first + done
            context = MethodContext(load_task_data(load_task(TASK), seed), Path("runs") / "cold-text")
            for name, predicted in predictions(context).items():
                found.setdefault(name, []).append(mean_auc(context, predicted))
            advance(done + 1)
    rows = {name: {"auc": float(np.mean(values)), "by_seed": values} for name, values in found.items()}
    command = f"python benchmarks/cold_text.py --first {arguments.first} --seeds {arguments.seeds}"
    write_json(RESULT, {"command": command, "task": TASK, "rows": rows, **environment()})
    for name, row in rows.items():
        print(f"{name:52s}{row['auc']:.4f}")


def predictions(context: MethodContext) -> dict[str, Floats]:
    """Returns every way's prediction of every item's mean."""
    mean = context.mean
    everything = np.arange(len(mean.count))
    answer_model, catalog = context.answer_model, context.interactions.catalog
    read = {"encoder": context.vectors, "prompt": state_vectors(answer_model.states)}
    read |= {
        name: hidden_state_vectors(answer_model.backbone, catalog, sentences) for name, sentences in SENTENCES.items()
    }

    def unrated(*names: str) -> Features:
        fields = context.fields if "fields" in names else {}
        return unrated_features({name: read[name] for name in names if name in read}, fields)

    ways = [(name,) for name in ("encoder", "prompt", "both", "fields")]
    ways += [("encoder", "fields"), *(("encoder", name, "fields") for name in read if name != "encoder")]
    result = {}
    for names in ways:
        known = unrated(*names)
        assert known.unrated is not None
        result[f"process: {', '.join(names)}"] = predict_unrated(mean, known.unrated).values(everything)
    best = unrated("encoder", "both", "fields")
    assert best.unrated is not None
    log_count = np.log1p(mean.count)[:, None].astype(np.float64)
    told = {"ridge": best.unrated, "kernel's features": best.text}
    told["kernel's features, and counts"] = np.concatenate([best.text, log_count, log_count**2], 1)
    for name, vectors in told.items():
        result[f"{name}: encoder, both, fields"] = smooth_by_text(mean, vectors, context.seed).values(everything)
    return result


def mean_auc(context: MethodContext, predicted: Floats) -> float:
    episodes = [*context.data.episodes("validation")[0], *context.data.episodes("test")[0]]
    values = [auc(predicted[one.query.items], one.query.likes(context.threshold)) for one in episodes]
    return float(np.mean([value for value in values if value is not None]))


if __name__ == "__main__":
    main()
