"""What a configuration leaves to the data and to the model it starts from, and what a workdir remembers of them."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

from clip_jax import cli, model_folder
from clip_jax.data.folder import open_divided
from clip_jax.errors import UserError
from clip_jax.models import OPENAI_MODELS
from clip_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from clip_jax.training.resolve import resolved, with_model
from clip_jax.training.run import run
from clip_jax.weights import load_variables
from tests import tiny
from tests.data.test_folder import write
from tests.training.test_run import CONFIG

pytestmark = pytest.mark.usefixtures("one_device")

FINETUNE = "finetune"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 12 images each."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(12):
        write(root / "cups" / f"{number}.png", number)
        write(root / "not_cups" / f"{number}.png", 255 - number)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model to start from."""
    path = tmp_path_factory.mktemp("model") / "source"
    model_folder.write(path, CONFIG.model, tiny.variables(CONFIG.model))
    return path


def config_of(photos, source, workdir=None, **overrides):
    overrides = {"init_from": str(source), "data.folder.path": str(photos), **overrides}
    return cli.load_config(FINETUNE, {name: str(text) for name, text in overrides.items()}, workdir)


def test_the_architecture_is_that_of_the_model_it_starts_from(photos, source):
    assert cli.load_config(FINETUNE).model == OPENAI_MODELS["ViT-B/32"]
    assert config_of(photos, source).model == CONFIG.model
    larger = config_of(photos, source, **{"model.vision.image_resolution": 64}).model
    assert larger == dataclasses.replace(
        CONFIG.model, vision=dataclasses.replace(CONFIG.model.vision, image_resolution=64)
    )
    assert config_of(photos, source, model="RN50").model == OPENAI_MODELS["RN50"]
    assert with_model({"model": 1, "init_from": "never opened"}, None) == {"model": 1, "init_from": "never opened"}
    with pytest.raises(UserError, match="nowhere"):
        config_of(photos, "./nowhere")


def test_epochs_are_steps_of_the_data_at_hand(photos, source, caplog):
    config = config_of(photos, source, batch_size=8, epochs=2.5, checkpoint_every=4)
    got = resolved(config)
    assert got == dataclasses.replace(config, total_steps=7, eval_every=3)  # 20 of 24 images; 2.5 * 20 / 8
    assert resolved(got) == got
    with caplog.at_level(logging.INFO, "clip_jax"):
        got = resolved(config_of(photos, source))
    assert (got.batch_size, got.total_steps, got.eval_every, got.checkpoint_every) == (20, 10, 1, 1)
    assert "batch_size is 20, not 64: there are no more images to train on" in caplog.text
    with pytest.raises(UserError, match=r"epochs=10 are 10 steps of 20, but total_steps is 50: leave one out"):
        resolved(config_of(photos, source, total_steps=50))
    plain = config_of(photos, source, total_steps=50, epochs=0, eval_every=5, checkpoint_every=5, batch_size=48)
    assert resolved(plain) == plain
    assert resolved(CONFIG) is CONFIG


def test_a_warm_up_below_one_is_a_share_of_the_run():
    for share, steps, total in ((0.1, 5, 50), (0.1, 0, 4), (0.25, 3, 11)):
        same = [learning_rate_schedule(OptimizerConfig(warmup_steps=warmup), total) for warmup in (share, steps)]
        assert [float(same[0](step)) for step in range(total)] == [float(same[1](step)) for step in range(total)]
    with pytest.raises(UserError, match=r"less than total_steps, or a share below 1; got 1\.5 and 50"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=1.5), 50)


def test_captions_that_are_all_equal_are_refused(source, tmp_path):
    for number in range(4):
        write(tmp_path / "words" / f"{number}.png", number, captions="a cup")
        write(tmp_path / "class" / "cups" / f"{number}.png", number)
    for folder, templates in (("words", ()), ("class", "a cup of {}")):
        fields = {"data.folder.templates": templates} if templates else {}
        with pytest.raises(UserError, match=r"all captions of .* are 'a cup.*': a model learns from what differs"):
            resolved(config_of(tmp_path / folder, source, **fields))
    (tmp_path / "words" / "2.txt").write_text("another cup")
    assert resolved(config_of(tmp_path / "words", source)).total_steps > 1


def test_a_run_keeps_what_it_started_from_and_goes_on_without_the_original(photos, source, tmp_path):
    photos, source = (shutil.copytree(path, tmp_path / path.name) for path in (photos, source))
    workdir = tmp_path / "run"
    changes = {
        "batch_size": 8,
        "epochs": 1,
        "checkpoint_every": 1,
        "optimizer.learning_rate": 1e-3,
        "optimizer.frozen": "logit_scale",
    }
    config = resolved(config_of(photos, source, **changes))
    model_folder.write(workdir / "start", tiny.VIT, tiny.variables(tiny.VIT))  # of a life that got to no checkpoint
    (workdir / "start.orbax-checkpoint-tmp-1").mkdir()
    state = run(config, str(workdir))
    assert int(state.step) == config.total_steps == 3
    assert sorted(path.name for path in workdir.glob("start*")) == ["start"]
    for got, want in zip(
        jax.tree.leaves(load_variables(workdir / "start")), jax.tree.leaves(load_variables(source)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    parts = json.loads((workdir / "held_out.json").read_text())["folder"]
    assert len(parts["held_out"]) == 4 and len(parts["train"]) == 20
    assert "cups/0.png" in parts["held_out"] + parts["train"]

    shutil.rmtree(source)
    shutil.rmtree(workdir / "checkpoints" / "3")
    again = run(resolved(config_of(photos, source, str(workdir), **changes)), str(workdir))
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    with pytest.raises(UserError, match="source"):
        config_of(photos, source, str(tmp_path / "another"), **changes)

    (photos / "cups" / "0.png").rename(photos / "cups" / "zero.png")
    open_divided.cache_clear()
    with pytest.raises(
        UserError, match=r"images of data.folder are not those that this run began with, which .*held_out"
    ):
        run(config, str(workdir))
