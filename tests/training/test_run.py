"""A whole run on embedded data: what it writes, that it resumes exactly, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from clip_jax import cli, model_folder
from clip_jax.errors import UserError
from clip_jax.training.metrics import read_metrics
from clip_jax.training.run import run
from clip_jax.weights import load_variables
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


def test_every_checkpoint_is_a_model_folder(undisturbed):
    workdir, state = undisturbed
    for source in (workdir, workdir / "checkpoints" / "6"):
        config, variables = load_variables(source)
        assert config.to_dict() == values()["model"]
        for got, want in zip(leaves(variables), leaves(state.variables), strict=True):
            np.testing.assert_array_equal(got, want)
    _, earlier = load_variables(workdir / "checkpoints" / "3")
    assert not np.array_equal(earlier["params"]["visual"]["proj"], variables["params"]["visual"]["proj"])


def test_the_best_checkpoint_stays_and_opens_by_name(tmp_path):
    """Scores fall after step 2; three newer checkpoints push out all but the newest three and the best."""
    scores = iter([0.5, 0.9, 0.7, 0.6, 0.4, 0.3])

    def make_evaluate(config, training):
        return lambda state: {"eval/digits/acc1": next(scores)}

    run(values(eval_every=1, checkpoint_every=1), str(tmp_path), make_evaluate)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5", "6"]
    assert model_folder.find(f"{tmp_path}@best").name == "2"
    assert model_folder.find(tmp_path).name == "6"


def test_without_an_evaluation_there_is_no_best(undisturbed):
    with pytest.raises(UserError, match="was evaluated, so none is best"):
        load_variables(f"{undisturbed[0]}@best")


def test_a_workdir_without_descriptions_still_opens_and_resumes(undisturbed, tmp_path):
    """Workdirs of before the model folder: the configuration lies in config.json alone."""
    workdir, state = undisturbed
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "description")
    config, variables = load_variables(tmp_path)
    assert config.to_dict() == values()["model"]
    want = load_variables(workdir / "checkpoints" / "3")[1]
    jax.tree.map(np.testing.assert_array_equal, variables, want)
    for got, want in zip(leaves(run(values(), str(tmp_path))), leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_flipped_bit_is_noticed_on_resuming(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints" / "6" / "variables"
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoints/6 is damaged: params/.* is not what was written"):
        run(values(), str(tmp_path))


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
