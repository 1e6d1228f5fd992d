"""A whole run on embedded data: what it writes, that it resumes exactly, and what it refuses."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from clip_jax import cli, model_folder, options
from clip_jax.errors import UserError
from clip_jax.judged_run import Evaluation
from clip_jax.models import Execution
from clip_jax.parallel import MeshConfig
from clip_jax.processing import Augment
from clip_jax.training import config as config_module
from clip_jax.training.config import RunConfig, check_same_run
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.training.run import run
from clip_jax.weights import load_variables
from clip_jax.workdir import read_metrics
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")

FIRST_CONFIG = Path(__file__).parent / "golden" / "first_config.json"
CONFIG = RunConfig(
    name="tiny",
    model=dataclasses.replace(tiny.VIT, text=dataclasses.replace(tiny.TEXT, vocab_size=49408)),
    data={"digits": {"weight": 1.0}},
    eval_datasets=("digits",),
    batch_size=16,
    total_steps=6,
    log_every=2,
    eval_every=100,
    checkpoint_every=3,
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.1, warmup_steps=2),
)


def config_of(**changes):
    """A tiny model that learns digits."""
    return dataclasses.replace(CONFIG, **changes)


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, run(config_of(), str(workdir))


def test_the_augmentation_of_the_config_is_applied(undisturbed, tmp_path):
    run(config_of(augment=Augment(crop="resized", scale=(0.5, 0.6)), total_steps=3), str(tmp_path))
    first, plain = (read_metrics(workdir)[0] for workdir in (tmp_path, undisturbed[0]))
    assert first["step"] == plain["step"] == 1
    assert first["loss"] != plain["loss"]


def test_evaluation_does_not_disturb_the_order_of_the_data(undisturbed, tmp_path):
    run(config_of(eval_every=2), str(tmp_path), Evaluation)
    lines = read_metrics(tmp_path)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert len([line for line in lines if "eval/digits/acc1" in line]) == 3
    expected = {line["step"]: line["loss"] for line in read_metrics(undisturbed[0])}
    assert losses == expected and set(losses) == {1, 2, 4, 6}


def test_a_run_writes_metrics_checkpoints_and_its_configuration(undisturbed):
    workdir, _ = undisturbed
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    for line in lines:
        assert {"loss", "logit_scale", "learning_rate", "grad_norm", "examples_per_second", "seconds"} <= set(line)
        assert np.isfinite(list(line.values())).all()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    written = json.loads((workdir / "config.json").read_text())
    assert options.from_dict(RunConfig, written, "config.json") == CONFIG
    assert list(workdir.glob("events.out.tfevents*"))


def test_every_checkpoint_is_a_model_folder(undisturbed):
    workdir, state = undisturbed
    for source in (workdir, workdir / "checkpoints" / "6"):
        config, variables = load_variables(source)
        assert config == CONFIG.model
        for got, want in zip(leaves(variables), leaves(state.variables), strict=True):
            np.testing.assert_array_equal(got, want)
    _, earlier = load_variables(workdir / "checkpoints" / "3")
    assert not np.array_equal(earlier["params"]["visual"]["proj"], variables["params"]["visual"]["proj"])


def test_the_best_checkpoint_stays_and_opens_by_name(tmp_path):
    """Scores fall after step 2; three newer checkpoints push out all but the newest three and the best."""
    scores = iter([0.5, 0.9, 0.7, 0.6, 0.4, 0.3])

    def make_evaluate(config, training):
        return lambda state: {"eval/digits/acc1": next(scores)}

    run(config_of(eval_every=1, checkpoint_every=1), str(tmp_path), make_evaluate)
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
    older = tmp_path / "checkpoints" / "3"
    shutil.rmtree(older / "description")
    shutil.rmtree(older / "run")
    (older / "files.json").unlink()
    with pytest.raises(UserError, match="its description is missing"):
        load_variables(tmp_path)
    metadata = older / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace('"description"', '"before_description"'))
    config, variables = load_variables(tmp_path)
    assert config == CONFIG.model
    want = load_variables(workdir / "checkpoints" / "3")[1]
    jax.tree.map(np.testing.assert_array_equal, variables, want)
    for got, want in zip(leaves(run(config_of(), str(tmp_path))), leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_run_stopped_half_way_resumes_bit_for_bit(undisturbed, tmp_path):
    class Killed(Exception):
        pass

    def kill_at_step_5(config, training):
        def evaluate(state):
            raise Killed

        return evaluate

    with pytest.raises(Killed):
        run(config_of(eval_every=5), str(tmp_path), kill_at_step_5)
    assert [line["step"] for line in read_metrics(tmp_path)][-1] == 4
    resumed = run(config_of(), str(tmp_path))
    for got, want in zip(leaves(resumed), leaves(undisturbed[1]), strict=True):
        np.testing.assert_array_equal(got, want)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4, 6]


def test_a_run_killed_in_its_last_evaluation_is_evaluated_when_it_goes_on(tmp_path):
    """The checkpoint of a step is written after its evaluation, so that the step is taken again."""

    class Killed(Exception):
        pass

    def killed(config, training):
        def evaluate(state):
            raise Killed

        return evaluate

    config = config_of(eval_every=6, log_every=1)
    with pytest.raises(Killed):
        run(config, str(tmp_path), killed)
    run(config, str(tmp_path), lambda config, training: lambda state: {"eval/digits/acc1": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path) if "eval/digits/acc1" in line] == [6]


def test_a_finished_run_is_left_as_it_is(undisturbed, caplog):
    workdir, state = undisturbed
    caplog.set_level(logging.INFO)
    for got, want in zip(leaves(run(config_of(), str(workdir))), leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)
    assert "compiling" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, "batch_size=16"),
        ({"seed": 1}, "seed=0"),
        ({"data": {"digits": {"weight": 1.0}, "shapes": {}}}, "data.shapes.kind=None"),
        ({"data": {"shapes": {}}}, "data.digits.kind='DigitsConfig'"),
        ({"data": {"digits": {"weight": 2.0}}}, "data.digits.weight=1.0"),
    ],
)
def test_a_workdir_of_another_run_is_refused(undisturbed, changes, message):
    with pytest.raises(UserError, match=f"holds a run with {message}"):
        run(config_of(**changes), str(undisturbed[0]))


def test_a_checkpoint_of_another_model_is_refused(undisturbed, tmp_path):
    workdir, _ = undisturbed
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    other = config_of(model=dataclasses.replace(CONFIG.model, embed_dim=16))
    (tmp_path / "config.json").write_text(json.dumps(options.to_dict(other)))
    with pytest.raises(UserError, match=r"of another model: params/text/text_projection \(\(64, 32\), expected"):
        run(other, str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatches": 3}, "multiple of 3 .* try 15 or 18"),
        ({"mesh": MeshConfig(data=3)}, "does not fit 1 device"),
        ({"data": {"folder": {"path": "/no/such/folder"}}}, "/no/such/folder"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(config_of(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"loss": "triplet"}, "one of softmax, sigmoid"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(**changes)


def test_a_workdir_without_a_checkpoint_is_not_locked(tmp_path):
    """A mistake that shows only with the first batch leaves a configuration that can be mended."""

    def fail(config, training):
        def evaluate(state):
            raise UserError("a mistake after the start")

        return evaluate

    class Reached(Exception):
        pass

    def reach(config, training):
        raise Reached

    with pytest.raises(UserError, match="after the start"):
        run(config_of(eval_every=1, seed=1), str(tmp_path), fail)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    with pytest.raises(Reached):
        run(CONFIG, str(tmp_path), reach)


def test_a_workdir_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(UserError, match=f"cannot write to the workdir {workdir}"):
            run(CONFIG, str(workdir))


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_a_lost_configuration_is_taken_from_the_newest_checkpoint(undisturbed, tmp_path, text, caplog):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="holds a run with seed=0, this one has 1"):
        run(config_of(seed=1), str(tmp_path))
    run(CONFIG, str(tmp_path))
    assert "config.json is damaged" in caplog.text and "has a copy" in caplog.text
    assert options.from_dict(RunConfig, json.loads((tmp_path / "config.json").read_text()), "it") == CONFIG


def test_a_finished_run_can_be_extended_and_says_so(undisturbed, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    assert int(run(config_of(total_steps=8), str(tmp_path)).step) == 8
    assert "goes on to step 8 instead of 6" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4, 6, 8]
    with pytest.raises(UserError, match="total_steps=8, this one has 6"):
        run(CONFIG, str(tmp_path))


def test_a_configuration_as_the_first_version_wrote_it_goes_on():
    previous = options.from_dict(RunConfig, json.loads(FIRST_CONFIG.read_text()), "config.json")
    assert previous.model.vision.patch_size == 8 and previous.optimizer.learning_rate == 2e-3
    faster = Execution(unroll=1, remat="full", block_tokens=100)
    check_same_run(dataclasses.replace(previous, execution=faster, log_every=1, loss_tile=7), previous)
    with pytest.raises(UserError, match="a run with dtype='float32', this one has 'bfloat16'"):
        check_same_run(dataclasses.replace(previous, execution=Execution(dtype="bfloat16")), previous)


def test_a_new_option_costs_one_line(undisturbed, monkeypatch, capsys):
    """An old workdir resumes, --help_config lists the option and an override sets it."""
    options_added = [("calm", int, options.option(3, "how long it waits"))]
    wider = dataclasses.make_dataclass("Wider", options_added, bases=(RunConfig,), frozen=True)
    values = {item.name: getattr(CONFIG, item.name) for item in dataclasses.fields(CONFIG)}
    workdir, state = undisturbed
    assert int(run(wider(**values), str(workdir)).step) == int(state.step)
    assert json.loads((workdir / "config.json").read_text())["calm"] == 3
    with pytest.raises(UserError, match="holds a run with calm=3, this one has 4"):
        run(wider(**values, calm=4), str(workdir))

    monkeypatch.setattr(config_module, "RunConfig", wider)
    assert cli.load_config("demo", {"calm": "4"}).calm == 4
    with pytest.raises(SystemExit, match="0"):
        cli.parse(cli.argparse.ArgumentParser(), ["--help_config"])
    assert "calm int = 3 how long it waits" in " ".join(capsys.readouterr().out.split())
