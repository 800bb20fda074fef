"""Pictures become vectors of items, by tiny random encoders of the real classes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ran
from made_pictures import covers_read, tiny_encoder
from made_shop import PLAIN, own_tastes, shop
from PIL import Image

from metarec import MetaRecommender
from metarec.config import RunConfig, validated
from metarec.data.item_vectors import read_item_vectors
from metarec.errors import BackboneError, DataError
from metarec.lm import image_encoder
from metarec.lm.image_encoder import read_images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "covers"
    folder.mkdir()
    for number, colour in enumerate([(250, 0, 0), (240, 10, 0), (0, 0, 250)]):
        Image.new("RGB", (20 + number, 24), colour).save(folder / f"i{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize(("kind", "width"), [("clip", 12), ("siglip", 16), ("vit", 16)])
def test_pictures_that_look_alike_get_vectors_that_are_alike(
    pictures: Path, tmp_path: Path, kind: str, width: int
) -> None:
    out = tmp_path / "covers.safetensors"
    assert read_images(pictures, tiny_encoder(tmp_path / "model", kind), out, batch=2) == 3
    vectors = read_item_vectors(out, ["i0", "i1", "i2", "i3"])
    assert vectors.shape == (4, width)
    assert np.isnan(vectors[3]).all()
    red, other, blue = vectors[:3]
    assert np.linalg.norm(red - other) < np.linalg.norm(red - blue) / 2


def test_colours_of_covers_tell_taste_for_items_that_nobody_rated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = shop(own_tastes())
    read = covers_read(tmp_path, world.kind, 0)

    def gain(**files: Any) -> float:
        features = ["fields", *(["vectors"] if files else [])]
        settings = {**PLAIN, "collaborative": {**PLAIN["collaborative"], "features": features}}
        recommender = MetaRecommender.from_pretrained("smollm2-135m-instruct", validated(RunConfig, settings, "test"))
        split = {"by": "item", "unseen": 0.2, "fractions": [0.6, 0.2, 0.2]}
        asked = {"split": split, "shots": [5], "query": {"max": 10, "min": 3}, "label": "rating >= 4"}
        frame = recommender.fit(world.orders, items=world.items, **asked, **files).evaluate().to_frame()
        return float(frame[frame["method"] == "metarec, adapted"]["auc_gain"].iloc[0])

    assert gain(vectors={"cover": read}) > gain() + 0.05


def test_a_reading_goes_on_where_it_stopped(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_encoder(tmp_path / "model", "vit"), tmp_path / "covers.safetensors"
    whole = tmp_path / "whole.safetensors"
    read_images(pictures, model, whole)
    read, seen = image_encoder._read, []

    def stopped(encoder: object, processor: object, files: list[Path], device: str) -> object:
        seen.extend(files)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return read(encoder, processor, files, device)

    monkeypatch.setattr(image_encoder, "_read", stopped)
    with pytest.raises(KeyboardInterrupt):
        read_images(pictures, model, out, batch=1)
    assert read_images(pictures, model, out, batch=1) == 3
    assert [path.stem for path in seen] == ["i0", "i1", "i1", "i2"]
    ids = ["i0", "i1", "i2"]
    np.testing.assert_allclose(read_item_vectors(out, ids), read_item_vectors(whole, ids), atol=1e-5)


def test_a_damaged_picture_is_named_and_left_out(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "i7.jpg").write_bytes(b"\xff\xd8 broken")
    Image.new("RGB", (64, 64)).save(pictures / "i8.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # i8 is a bomb then
    with caplog.at_level(logging.WARNING):
        assert read_images(pictures, tiny_encoder(tmp_path / "model", "vit"), tmp_path / "v.safetensors") == 3
    assert "i7.jpg' cannot be read" in caplog.text
    assert "i8.png' cannot be read" in caplog.text


def test_what_is_no_folder_of_pictures_or_no_encoder_is_refused(pictures: Path, tmp_path: Path) -> None:
    model, out = tiny_encoder(tmp_path / "model", "vit"), tmp_path / "v.safetensors"
    with pytest.raises(DataError, match="holds no picture"):
        read_images(tmp_path / "nowhere", model, out)
    read_images(pictures, model, out)
    with pytest.raises(DataError, match="of another model"):
        read_images(pictures, tiny_encoder(tmp_path / "other", "siglip"), out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="is no image encoder"):
        read_images(pictures, tmp_path / "empty", tmp_path / "w.safetensors")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BackboneError, match="pickled weights alone"):
        read_images(pictures, tmp_path / "pickled", tmp_path / "w.safetensors")


def test_the_command_reads_a_folder(metarec: Callable[..., Ran], pictures: Path, tmp_path: Path) -> None:
    model, out = tiny_encoder(tmp_path / "model", "vit"), tmp_path / "covers.safetensors"
    ran = metarec("features", "images", pictures, "--model", model, "--out", out, "--json")
    assert json.loads(ran.out) == {"vectors": 3, "file": str(out)}
    assert metarec("features", "images", pictures, "--model", model, "--out", "v.npz").status == 2
    assert metarec("features", "images", pictures, "--model", tmp_path / "no", "--out", out).status == 2
