"""A run that trains a classification head: how it starts, what it leaves alone, and that it goes on bit for bit."""

import dataclasses
import logging
import shutil

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import evaluate
from clip_jax import interpolate, judged_run, model_folder
from clip_jax.data.digits import CLASS_NAMES, Digits
from clip_jax.errors import UserError
from clip_jax.evaluation import head
from clip_jax.evaluation.datasets import evaluation_set
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.examples import encode_examples
from clip_jax.evaluation.head import classify_by_head, knows
from clip_jax.evaluation.tasks import TASKS, chosen_tasks
from clip_jax.evaluation.zero_shot import zero_shot
from clip_jax.models import variable_shapes
from clip_jax.training.config import make_training
from clip_jax.training.initial_weights import InitialWeights, fitted_weights
from clip_jax.training.resolve import with_classes
from clip_jax.training.run import make_reader, run
from clip_jax.weights import load_variables, save
from clip_jax.workdir import read_metrics
from tests import tiny
from tests.training.test_run import CONFIG, config_of, leaves

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model without a head, of random weights that tell images apart."""
    generator = np.random.default_rng(0)
    shapes = variable_shapes(CONFIG.model)
    variables = jax.tree.map(lambda leaf: np.asarray(generator.normal(0, 0.2, leaf.shape), np.float32), shapes)
    variables["params"]["logit_scale"] = np.float32(3.0)
    path = tmp_path_factory.mktemp("models") / "source"
    model_folder.write(path, CONFIG.model, variables)
    return path


def config_from(source, **changes):
    """A run on digits whose classes are left to the data."""
    init = InitialWeights(str(source), **changes.pop("init", {}))
    settings = {"loss": "cross_entropy", "label_smoothing": 0.1, "ema_decay": 0.9}
    return with_classes(config_of(**{"init": init, "total_steps": 4, "checkpoint_every": 2, **settings, **changes}))


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """(config, workdir, last state)."""
    workdir, config = tmp_path_factory.mktemp("head") / "run", config_from(source)
    return config, workdir, run(config, str(workdir), judged_run.Evaluation, judged_run.start_of_head)


@pytest.fixture(scope="module")
def started(trained):
    """(encoders, variables before the first step)."""
    config, workdir, state = trained
    training, (_, variables) = make_training(config), load_variables(workdir / "start")
    # Four steps move the average by little, and from nothing it would be far.
    np.testing.assert_allclose(state.ema["classifier"], variables["params"]["classifier"], atol=0.02)
    return make_encoders(training.model, training.partitioner), variables


def test_a_zero_shot_head_predicts_as_zero_shot_evaluation_does_image_by_image(started):
    encoders, variables = started
    dataset = evaluation_set("digits")
    by_head, by_texts = (classify(encoders, variables, dataset, False) for classify in (classify_by_head, zero_shot))
    np.testing.assert_allclose(by_head.scores, np.exp(3.0) * by_texts.scores, rtol=1e-5, atol=1e-5)
    predictions = by_head.scores.argmax(axis=1)
    np.testing.assert_array_equal(predictions, by_texts.scores.argmax(axis=1))
    assert len(set(predictions.tolist())) > 1
    # Another order, and a part of the classes: names decide.
    part = dataclasses.replace(dataset, class_names=CLASS_NAMES[::-1])
    np.testing.assert_array_equal(classify_by_head(encoders, variables, part, False).scores, by_head.scores[:, ::-1])
    assert knows(CLASS_NAMES, dataclasses.replace(dataset, class_names=("nine", "one")))
    assert not knows(CLASS_NAMES, dataclasses.replace(dataset, class_names=("one", "eleven")))


def test_a_linear_probe_head_predicts_as_scikit_learn(started, source, monkeypatch):
    monkeypatch.setattr(head, "choose_strength", lambda *_, **options: 0.01 if not options["bias"] else None)
    encoders, variables = started
    config = config_from(source, init={"head_from": "linear_probe"})
    made = judged_run.start_of_head(config, make_training(config), make_reader(config))
    assert made.func is head.linear_probe_head
    classifier = head.linear_probe_head(encoders, variables, [Digits("train")])
    variables = {"params": {**variables["params"], "classifier": classifier}}
    train_split, test = (
        encode_examples(encoders.encode_images, variables, Digits(split), encoders.preprocess)
        for split in ("train", "test")
    )
    expected = LogisticRegression(C=100, fit_intercept=False, max_iter=1000).fit(
        train_split.features, train_split.labels
    )
    ours = classify_by_head(encoders, variables, evaluation_set("digits"), False)
    np.testing.assert_allclose(ours.scores, expected.decision_function(test.features), atol=2e-2)
    assert (ours.scores.argmax(axis=1) == expected.predict(test.features)).mean() > 0.99
    assert ours.metrics["acc1"] > 0.3  # of random weights


def test_only_images_and_head_are_trained_and_a_killed_run_goes_on_bit_for_bit(source, trained, tmp_path):
    config, workdir, state = trained
    assert config.model.classes == CLASS_NAMES
    before, after = load_variables(source)[1]["params"], load_variables(workdir)[1]["params"]
    jax.tree.map(np.testing.assert_array_equal, before["text"], after["text"])
    assert before["logit_scale"] == after["logit_scale"]
    assert not np.array_equal(before["visual"]["proj"], after["visual"]["proj"])
    for kept in (state.opt_state[0].mu, state.ema):
        assert set(kept) == {"classifier", "visual"}
    shutil.copytree(workdir, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    again = run(config, str(tmp_path / "killed"))  # what starts a head is not needed again
    for got, want in zip(leaves(again), leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_model_folder_knows_its_classes_and_evaluation_asks_the_head(trained, tmp_path, capsys):
    _, workdir, _ = trained
    found, _ = load_variables(workdir)
    assert found.classes == CLASS_NAMES
    report = tmp_path / "report.html"
    assert evaluate.main(["--weights", str(workdir), "--datasets", "digits", "--report", str(report)]) == 0
    *_, line = [line for line in read_metrics(workdir) if "eval/digits/acc1" in line]
    (row,) = [row for row in capsys.readouterr().out.splitlines() if "acc1" in row]
    assert row.split() == ["digits", "head_classification", "acc1", f"{line['eval/digits/acc1']:.4f}"]
    assert "digits, by the head" in report.read_text()
    dataset = evaluation_set("digits")
    assert chosen_tasks(dataset, (), CLASS_NAMES) == [TASKS["head"]]
    assert chosen_tasks(dataset, (), CLASS_NAMES[:9]) == [TASKS["zeroshot"]]
    with pytest.raises(UserError, match="digits has no classes that a head of the model has all, which head needs"):
        chosen_tasks(dataset, ["head"])


def test_a_head_is_taken_from_a_model_by_the_names_of_its_classes(trained, caplog):
    config, workdir, _ = trained
    caplog.set_level(logging.INFO)
    turned = dataclasses.replace(config.model, classes=CLASS_NAMES[::-1])
    theirs = load_variables(workdir)[1]["params"]["classifier"]
    ours = fitted_weights(InitialWeights(str(workdir)), turned)["params", "classifier"]
    np.testing.assert_array_equal(ours, theirs[::-1])
    for init, classes in (
        (InitialWeights(str(workdir), ("classifier",)), CLASS_NAMES),
        (InitialWeights(str(workdir)), ("zero", "one")),
    ):
        wanted = dataclasses.replace(config.model, classes=classes)
        assert ("params", "classifier") not in fitted_weights(init, wanted)
    assert "has other classes ('eight' differs) and is left out" in caplog.text
    with pytest.raises(UserError, match=r"classifier \(10, 32\) -> none"):
        fitted_weights(InitialWeights(str(workdir)), CONFIG.model)
    with pytest.raises(UserError, match="a head that starts zero-shot is made of texts, so the text tower cannot"):
        fitted_weights(InitialWeights(str(workdir), ("text/*", "classifier")), config.model)


def test_other_formats_leave_the_head_out_and_say_so(trained, tmp_path, caplog):
    _, workdir, _ = trained
    config, variables = load_variables(workdir)
    save(tmp_path / "exported", config, variables, "open_clip")
    assert "the head of 10 classes (zero, one, two, ...) is left out: open_clip has no place for it" in caplog.text
    again, written = load_variables(tmp_path / "exported")
    assert again == dataclasses.replace(config, classes=())
    assert written["params"].keys() == variables["params"].keys() - {"classifier"}


def test_encoder_and_head_are_interpolated_with_the_start_of_the_run_and_not_with_a_model_without_one(
    source, trained, tmp_path
):
    _, workdir, state = trained
    interpolate.main([str(workdir / "start"), str(workdir), str(tmp_path / "half")])
    config, half = load_variables(tmp_path / "half")
    start = load_variables(workdir / "start")[1]["params"]["classifier"]
    assert config.classes == CLASS_NAMES and not np.array_equal(start, state.params["classifier"])
    np.testing.assert_allclose(half["params"]["classifier"], (start + state.params["classifier"]) / 2, rtol=1e-6)
    with pytest.raises(UserError, match=r"has none and .* has one of 10 \(zero, one, two, ...\); .* is WORKDIR/start"):
        interpolate.main([str(source), str(trained[1]), str(tmp_path / "never")])


CLASSES = ("one", "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(CONFIG.model, classes=CLASSES)}, "model.classes makes a head, which the loss"),
        ({"label_smoothing": 0.1}, "label_smoothing is an option of the loss cross_entropy"),
        ({"loss": "cross_entropy", "label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"init": {"head_from": "nowhere"}}, "head_from must be one of zeroshot, linear_probe; got 'nowhere'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        changes = {**changes, **({"init": InitialWeights(**changes["init"])} if "init" in changes else {})}
        config_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(CONFIG.model, classes=CLASSES)}, "data.digits has 8 classes that model.classes"),
        ({"optimizer": dataclasses.replace(CONFIG.optimizer, frozen=("visual/*", "classifier"))}, "leaves nothing"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused_before_the_first_step(source, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(config_from(source, **changes), str(tmp_path / "run"), None, judged_run.start_of_head)


@pytest.mark.parametrize("classes", [("a",), ("a", "a"), ("a", "")])
def test_impossible_classes_are_refused(classes):
    with pytest.raises(UserError, match="classes must"):
        dataclasses.replace(tiny.VIT, classes=classes)
