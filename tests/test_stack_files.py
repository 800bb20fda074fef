"""The stack in the cache: read again for the same inputs, never for others, and made again where it is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known import CANDIDATES, GENRE, SUPPORT, THRESHOLD, TRAIN, VECTORS, WORLD

from metarec.config import CollaborativeConfig, validated
from metarec.scorers.collaborative.features import Features
from metarec.scorers.collaborative.stack import FittedStack
from metarec.training import stack_files
from metarec.training.stack_files import cached_stack

SETTINGS = validated(
    CollaborativeConfig,
    {"stack": {"folds": 2}, "kernel": {"steps": 2}, "gp": {"factors": 2, "sweeps": 1}},
    "test",
)
GIVEN: dict[str, Any] = {
    "interactions": WORLD,
    "users": TRAIN,
    "features": Features({"text": VECTORS, "genres": GENRE}, VECTORS),
    "settings": SETTINGS,
    "threshold": THRESHOLD,
    "seed": 0,
}


@pytest.fixture
def fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[FittedStack]:
    """Collects what is fitted and not read, in an empty cache."""
    made: list[FittedStack] = []
    real = stack_files.fit_stack

    def counted(*arguments: Any, **options: Any) -> FittedStack:
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setenv("METAREC_CACHE", str(tmp_path))
    monkeypatch.setattr(stack_files, "fit_stack", counted)
    return made


def test_a_stack_that_is_read_again_predicts_the_same_bit_for_bit(fits: list[FittedStack]) -> None:
    first, second = cached_stack(**GIVEN), cached_stack(**GIVEN)
    assert len(fits) == 1
    np.testing.assert_array_equal(first.prior.values(CANDIDATES), second.prior.values(CANDIDATES))
    assert first.out_of_fold.fold == second.out_of_fold.fold
    whole = [(first.stack, second.stack)]
    folds = zip(first.out_of_fold.folds, second.out_of_fold.folds, strict=True)
    for one, other in [*whole, *((one.stack, other.stack) for one, other in folds)]:
        np.testing.assert_array_equal(
            one.posterior_mean(SUPPORT, CANDIDATES), other.posterior_mean(SUPPORT, CANDIDATES)
        )
        np.testing.assert_array_equal(one.leave_one_out(SUPPORT), other.leave_one_out(SUPPORT))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"threshold": THRESHOLD + 1},
        {"users": TRAIN[1:]},
        {"features": Features({"text": VECTORS * 2, "genres": GENRE}, VECTORS)},
        {"settings": SETTINGS.model_copy(update={"members": "gp"})},
        {"interactions": replace(WORLD, rating=WORLD.rating[::-1].copy())},
        {"interactions": replace(WORLD, liked=WORLD.rating > THRESHOLD)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_a_stack_depends_on_makes_it_another(fits: list[FittedStack], other: dict[str, Any]) -> None:
    keys = {
        stack_files._key(given["interactions"], given["users"], given["features"], given["settings"], rest)
        for given in (GIVEN, {**GIVEN, **other})
        for rest in [{"threshold": given["threshold"], "seed": given["seed"]}]
    }
    assert len(keys) == 2


def test_a_damaged_stack_is_fitted_again(fits: list[FittedStack], tmp_path: Path) -> None:
    cached_stack(**GIVEN)
    (file,) = tmp_path.glob("stack/*/stack.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    cached_stack(**GIVEN)
    assert len(fits) == 2


def test_the_files_name_no_user(fits: list[FittedStack], tmp_path: Path) -> None:
    named = replace(WORLD, users=tuple(f"person-{user}" for user in WORLD.users))
    cached_stack(**{**GIVEN, "interactions": named})
    assert len(fits) == 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"person-" in file.read_bytes()]
