"""What a run starts from: another model's weights, at another image size and context length."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
import scipy.ndimage
import torch
from flax.traverse_util import flatten_dict

from clip_jax import model_folder
from clip_jax.errors import UserError
from clip_jax.parallel import MeshConfig
from clip_jax.training.config import RunConfig, make_training
from clip_jax.training.initial_weights import (
    InitialWeights,
    fitted_weights,
    resize_context,
    resize_grid,
    start_from,
)
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.training.state import initial_state
from tests import tiny


def positions(tokens, width=24):
    return np.random.default_rng(tokens).normal(size=(tokens, width)).astype(np.float32)


def changed(config, **fields):
    """A config with other fields, those of a tower as `vision__image_resolution`."""
    for name, value in fields.items():
        part, _, field = name.partition("__")
        if field:
            value, name = dataclasses.replace(getattr(config, part), **{field: value}), part
        config = dataclasses.replace(config, **{name: value})
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"vit": a model folder, "resnet": another}."""
    root = tmp_path_factory.mktemp("models")
    for name, config in (("vit", tiny.VIT), ("resnet", tiny.RESNET)):
        model_folder.write(root / name, config, tiny.variables(config))
    return {name: str(root / name) for name in ("vit", "resnet")}


@pytest.mark.parametrize(("old", "new"), [(7, 14), (7, 12), (14, 7), (24, 16), (5, 1), (3, 3)])
def test_grids_are_resized_as_open_clip_does(old, new):
    """Its `resize_pos_embed`."""
    before = positions(1 + old**2)
    grid = torch.from_numpy(before[1:]).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    expected = np.concatenate([before[:1], grid.permute(0, 2, 3, 1).reshape(new**2, -1).numpy()])
    bound = 1e-6 * np.abs(before).max()
    np.testing.assert_allclose(resize_grid(before, 1 + new**2, "bicubic"), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("old", "new"), [(7, 14), (14, 7), (16, 24), (5, 1)])
def test_linear_is_big_visions_zoom(old, new):
    before = positions(1 + old**2)
    grid = scipy.ndimage.zoom(before[1:].reshape(old, old, -1), (new / old, new / old, 1), order=1)
    expected = np.concatenate([before[:1], grid.reshape(new**2, -1)])
    np.testing.assert_allclose(resize_grid(before, 1 + new**2, "linear"), expected, rtol=0, atol=1e-6)


def test_a_longer_context_is_resized_as_open_clip_does_and_a_shorter_one_is_cut():
    """Its `resize_text_pos_embed`."""
    before = positions(77)
    rows = torch.from_numpy(before).T[None]
    expected = torch.nn.functional.interpolate(rows, size=248, mode="linear", antialias=False, align_corners=False)
    np.testing.assert_allclose(resize_context(before, 248), expected[0].T.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(resize_context(before, 32), before[:32])


def test_what_was_resized_is_said_and_all_else_is_taken_as_it_is(folders, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("clip_jax"), "propagate", True)
    caplog.set_level("INFO")
    config = changed(tiny.VIT, vision__image_resolution=48, text__context_length=20)
    weights = fitted_weights(InitialWeights(folders["vit"]), config)
    weights = {"/".join(path[1:]): leaf for path, leaf in weights.items()}
    source = flatten_dict(tiny.variables(tiny.VIT)["params"], sep="/")
    image, text = "visual/positional_embedding", "text/positional_embedding"
    np.testing.assert_array_equal(weights.pop(image), resize_grid(source.pop(image), 37, "bicubic"))
    np.testing.assert_array_equal(weights.pop(text), resize_context(source.pop(text), 20))
    assert weights.keys() == source.keys()
    for path, leaf in source.items():
        np.testing.assert_array_equal(weights[path], leaf)
    assert f"resized: {text} (16, 64) -> (20, 64), {image} (17, 64) -> (37, 64)" in caplog.text


def test_the_attention_pool_of_a_resnet_is_resized_too(folders):
    config = changed(tiny.RESNET, vision__image_resolution=96)
    weights = fitted_weights(InitialWeights(folders["resnet"], init_resize="linear"), config)
    assert weights["params", "visual", "attnpool", "positional_embedding"].shape == (10, 256)
    assert ("batch_stats", "visual", "bn1", "mean") in weights


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            "resnet",
            {},
            r"does not fit the model: visual/bn1/mean \(4,\) -> none, .* and \d+ more; change the model, or",
        ),
        ("vit", {"vision__patch_size": 16}, r"model: visual/conv1/kernel \(8, 8, 3, 64\) -> \(16, 16, 3, 64\); change"),
        ("vit", {"logit_bias": True}, r"logit_bias missing -> \(\); change"),
        ("vit", {"activation": "gelu"}, r"'quick_gelu', but model.activation is 'gelu'; set --config.model.activ"),
        ("vit", {"image_std": (0.5, 0.5, 0.5)}, r"image_std=\(0.26862954, .* set --config.model.image_std=0.268629"),
        ("vit", {"text__lowercase": False}, r"has text.lowercase=True, but model.text.lowercase is False"),
    ],
)
def test_what_does_not_fit_is_named(folders, model, changes, message):
    with pytest.raises(UserError, match=message):
        fitted_weights(InitialWeights(folders[model]), changed(tiny.VIT, **changes))


def test_what_may_start_fresh_does_and_is_listed(folders, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("clip_jax"), "propagate", True)
    caplog.set_level("INFO")
    config = changed(tiny.VIT, text__width=32, text__lowercase=False)
    weights = fitted_weights(InitialWeights(folders["vit"], ("text/*", "logit_scale")), config)
    assert {path[1] for path in weights} == {"visual"}
    assert "text/text_projection (64, 32) -> (32, 32)" in caplog.text and "logit_scale () -> ()" in caplog.text
    with pytest.raises(UserError, match=r"init_fresh: the pattern 'txt/.' matches no parameter of either model"):
        fitted_weights(InitialWeights(folders["vit"], ("txt/*",)), config)


@pytest.mark.parametrize("fields", [{"init_resize": "nearest"}, {"init_fresh": ("text/*",)}])
def test_impossible_values_are_refused(fields):
    with pytest.raises(UserError, match=r"^init_"):
        InitialWeights(**fields)


def test_a_state_starts_from_the_weights_and_so_does_its_average(folders):
    optimizer = OptimizerConfig(warmup_steps=1, frozen=("visual/*",))
    config = RunConfig("x", tiny.VIT, optimizer=optimizer, ema_decay=0.5, mesh=MeshConfig(2, 2, 2))
    training = make_training(config)
    fresh = initial_state(training, 0)
    state = start_from(InitialWeights(folders["vit"], ("*bias",)), tiny.VIT, fresh, training.frozen)
    source, before, after = (
        flatten_dict(tree, sep="/") for tree in (tiny.variables(tiny.VIT)["params"], fresh.params, state.params)
    )
    for path, leaf in after.items():
        assert leaf.sharding == before[path].sharding
        np.testing.assert_array_equal(leaf, before[path] if path.endswith("bias") else source[path])
    average = flatten_dict(state.ema, sep="/")
    assert average.keys() == {path for path in after if not path.startswith("visual/")}
    for path, leaf in average.items():
        np.testing.assert_array_equal(leaf, after[path])
        assert leaf.sharding == after[path].sharding and leaf is not after[path]
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
