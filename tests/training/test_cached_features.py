"""Features that are computed once: the same run as with a tower that encodes every batch anew."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.data.pipeline import InputConfig, TrainBatches
from clip_jax.errors import UserError
from clip_jax.planner.flops import train_flops
from clip_jax.processing import Augment
from clip_jax.training import cached_features
from clip_jax.training.config import make_training
from clip_jax.training.loop import to_devices
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.training.run import make_reader, run
from clip_jax.workdir import read_metrics
from tests.training.test_run import CONFIG

FROZEN = OptimizerConfig(learning_rate=2e-3, warmup_steps=2, frozen=("visual/*",))
ANEW = dataclasses.replace(
    CONFIG,
    data={"digits": {"weight": 1.0}, "again": {"kind": "digits", "weight": 0.5}},
    optimizer=FROZEN,
    augment=Augment(crop="center"),
    microbatches=2,
    log_every=1,
)
ONCE = dataclasses.replace(ANEW, cache_features=True)


@pytest.mark.usefixtures("one_device")
def test_a_run_on_features_is_the_run_on_images(tmp_path):
    states = {name: run(config, str(tmp_path / name)) for name, config in (("anew", ANEW), ("once", ONCE))}
    losses = {name: [line["loss"] for line in read_metrics(tmp_path / name)] for name in states}
    np.testing.assert_allclose(losses["once"], losses["anew"], rtol=1e-5)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(states["once"].params), jax.tree.leaves(states["anew"].params), strict=True
    ):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=1e-4, err_msg=str(path))
    shutil.rmtree(tmp_path / "once" / "checkpoints" / "6")
    again = run(ONCE, str(tmp_path / "once"))
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(states["once"]), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert train_flops(ONCE) < train_flops(ANEW)


@pytest.mark.parametrize("processes", [0, 1])
def test_the_number_of_an_example_leads_to_its_image(processes):
    reader = make_reader(ANEW)
    found = []
    for by_number in (False, True):
        batches = TrainBatches(dataclasses.replace(reader, by_number=by_number), InputConfig(processes * by_number))
        found.append([next(batches) for _ in range(3)])
        batches.close()
    for images, numbers in zip(*found, strict=True):
        np.testing.assert_array_equal(numbers["text"], images["text"])
        np.testing.assert_array_equal([reader.pixels(number) for number in numbers["image"].tolist()], images["image"])
    assert max(batch["image"].max() for batch in found[1]) >= reader.mixture.starts[1]


def test_features_belong_to_their_images_wherever_the_mesh_puts_a_hosts_rows(monkeypatch):
    """On a TPU the hosts' rows need not stand in a batch in the order of the hosts."""

    def turned(batch, partitioner):
        return to_devices({name: np.roll(rows, 5, axis=0) for name, rows in batch.items()}, partitioner)

    def brightness(model, variables, images):
        return jnp.tile(images.mean((1, 2, 3), keepdims=True)[:, 0, 0], model.config.embed_dim)

    monkeypatch.setattr(cached_features, "to_devices", turned)
    monkeypatch.setattr(cached_features, "pixel_features", brightness)
    reader = make_reader(dataclasses.replace(ANEW, batch_size=512))
    found = cached_features.image_features(make_training(ANEW), {}, reader)
    expected = [reader.pixels(number).mean() for number in range(len(found))]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": Augment()}, "set augment.crop=center"),
        ({"augment": Augment(crop="center", flip=True)}, "neither augment.flip"),
        ({"patch_dropout": 0.5}, "set patch_dropout to 0"),
        ({"input": InputConfig(on_damage="skip")}, "set on_damage to stop"),
        ({"optimizer": dataclasses.replace(FROZEN, frozen=("visual/conv1/*",))}, "but the image tower is trained"),
    ],
    ids=str,
)
def test_images_that_do_not_repeat_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_training(dataclasses.replace(ONCE, **changes))
