"""Features that are kept: found again, never stale, computed again where damaged."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.errors import UserError
from clip_jax.evaluation import features as module
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.features import extract
from clip_jax.models import CLIP, TextConfig
from clip_jax.parallel import MeshConfig, make_partitioner
from tests import tiny

CONFIG = dataclasses.replace(tiny.VIT, text=TextConfig(32, 2, 64, 1, context_length=16))


class Pictures:
    """Random images; some of them can be replaced."""

    name = "pictures"

    def __init__(self, replaced=None, broken=None):
        self.replaced, self.broken = replaced or {}, broken

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == self.broken:
            raise UserError("cannot be read")
        pixels = np.random.default_rng(self.replaced.get(index, index)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        return Example(Image.fromarray(pixels), label=index % 3)


@functools.cache
def encoders():
    return make_encoders(CLIP(CONFIG), make_partitioner(MeshConfig(), jax.devices()[:1]))


@functools.cache
def variables():
    return tiny.variables(CONFIG)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache, in chunks of 4."""
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "CHUNK", 4)
    return tmp_path / "features"


@pytest.fixture
def encoded(monkeypatch):
    """How many examples were encoded in each chunk that was."""
    counts, encode = [], module.encode_examples

    def counting(encoder, variables, part, *arguments, **options):
        counts.append(len(part))
        return encode(encoder, variables, part, *arguments, **options)

    monkeypatch.setattr(module, "encode_examples", counting)
    return counts


def get(source=None, weights=None, own=None):
    return extract(own or encoders(), weights or variables(), source or Pictures(), progress=False)


def test_features_are_those_of_the_model_and_are_found_again(cache, encoded):
    first = get()
    model, preprocess = encoders().model, encoders().preprocess
    images = np.stack([preprocess(Pictures()[index].image) for index in range(10)])
    expected = model.apply(variables(), images, method=model.probe_features)
    np.testing.assert_allclose(first.values, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(first.labels, np.arange(10) % 3)
    assert encoded == [4, 4, 2] and len(list(cache.glob("*/*.npz"))) == 3
    again = get()
    assert encoded == [4, 4, 2]
    np.testing.assert_array_equal(again.values, first.values)
    np.testing.assert_array_equal(again.labels, first.labels)


def test_what_was_interrupted_goes_on_from_there(cache, encoded):
    with pytest.raises(UserError, match="pictures, example 9: cannot be read"):
        get(Pictures(broken=9))
    assert encoded == [4, 4]
    get()
    assert encoded == [4, 4, 2]


def test_another_image_label_or_model_finds_nothing(cache, encoded):
    first = get()
    changed = get(Pictures(replaced={5: 77}))
    assert encoded == [4, 4, 2, 4]
    assert (changed.values != first.values).any(axis=1).tolist() == [index == 5 for index in range(10)]

    class Relabelled(Pictures):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), label=7)

    assert get(Relabelled()).labels.tolist() == [7] * 10
    assert encoded == [4, 4, 2, 4, 4, 4, 2]
    half = jax.tree.map(lambda array: array / 2, variables())
    get(weights=half)
    assert len(encoded) == 10
    activation = dataclasses.replace(CONFIG, activation="gelu")
    get(own=make_encoders(CLIP(activation), encoders().partitioner))
    assert len(encoded) == 13


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_chunk_is_computed_again(cache, encoded, damage, caplog):
    first = get()
    file = sorted(cache.glob("*/*.npz"))[0]
    content = file.read_bytes()
    middle = content.index(b"NUMPY") + 200
    spoilt = {
        "cut": content[: len(content) // 2],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
        "other": sorted(cache.glob("*/*.npz"), key=lambda other: other.stat().st_size)[0].read_bytes(),
    }[damage]
    if spoilt == content:
        file = sorted(cache.glob("*/*.npz"))[1]
    file.write_bytes(spoilt)
    again = get()
    assert len(encoded) == 4 and "is damaged" in caplog.text
    np.testing.assert_array_equal(again.values, first.values)
    get()
    assert len(encoded) == 4


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "file"))
    assert len(get()) == 10
    assert "cannot keep " in caplog.text and "computed again next time" in caplog.text
