"""A whole run on embedded data: what it writes, that it resumes exactly, and what it refuses."""

import json

import numpy as np
import pytest

from clip_jax import cli
from clip_jax.errors import UserError
from clip_jax.training.metrics import read_metrics
from clip_jax.training.run import run
from tests import tiny


def values(**changes):
    """The demo's configuration, made tiny and fed with digits alone."""
    config = cli.load_config("demo").to_dict()
    model = tiny.VIT.to_dict()
    model["text"]["vocab_size"] = 49408
    config.update(model=model, data={"digits": {"weight": 1.0}}, eval_datasets=("digits",), batch_size=16)
    config.update(total_steps=6, log_every=2, eval_every=100, checkpoint_every=3)
    config["optimizer"]["warmup_steps"] = 2
    return {**config, **changes}


def leaves(state):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, run(values(), str(workdir))


def test_a_run_writes_metrics_checkpoints_and_its_configuration(undisturbed):
    workdir, _ = undisturbed
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    for line in lines:
        assert {"loss", "logit_scale", "learning_rate", "grad_norm", "examples_per_second", "seconds"} <= set(line)
        assert np.isfinite(list(line.values())).all()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 16
    assert list(workdir.glob("events.out.tfevents*"))


def test_a_run_stopped_half_way_resumes_bit_for_bit(undisturbed, tmp_path):
    class Killed(Exception):
        pass

    def kill_at_step_5(config, training):
        def evaluate(state):
            raise Killed

        return evaluate

    with pytest.raises(Killed):
        run(values(eval_every=5), str(tmp_path), kill_at_step_5)
    assert [line["step"] for line in read_metrics(tmp_path)][-1] == 4
    resumed = run(values(), str(tmp_path))
    for got, want in zip(leaves(resumed), leaves(undisturbed[1]), strict=True):
        np.testing.assert_array_equal(got, want)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4, 6]


def test_a_finished_run_is_left_as_it_is(undisturbed):
    workdir, state = undisturbed
    for got, want in zip(leaves(run(values(), str(workdir))), leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, "batch_size=16"),
        ({"seed": 1}, "seed=0"),
        ({"data": {"digits": {"weight": 2.0}}}, "data.digits.weight=1.0"),
    ],
)
def test_a_workdir_of_another_run_is_refused(undisturbed, changes, message):
    with pytest.raises(UserError, match=f"holds a run with {message}"):
        run(values(**changes), str(undisturbed[0]))


def test_a_checkpoint_of_another_model_is_refused(undisturbed, tmp_path):
    workdir, _ = undisturbed
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    other = values()
    other["model"]["embed_dim"] = 16
    with pytest.raises(UserError, match=r"of another model: params/text/text_projection \(\(64, 32\), expected"):
        run(other, str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "multiple of 8 .* try 8 or 16"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"mesh": {"data": 3, "fsdp": 1, "tensor": 1, "rules": {}}}, "does not fit 8 devices"),
        ({"loss": "triplet"}, "one of softmax, sigmoid"),
        ({"data": {"folder": {"path": "/no/such/folder"}}}, "/no/such/folder"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(values(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
