"""Few-shot and the linear probe as tasks: from a data set's name to its row and its picture."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

import evaluate
from clip_jax import model_folder
from clip_jax.data.digits import CLASS_NAMES
from clip_jax.data.folder import LabelledFolder
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import EvaluationSet, evaluation_set
from clip_jax.evaluation.features import Features
from clip_jax.evaluation.few_shot import SEEDS, SHOTS, draw, fit_shots
from clip_jax.evaluation.linear_probe import Splits, extract_splits, fit_probe, rank_in_class
from clip_jax.reports.few_shot import few_shot_curve
from tests.evaluation.test_features import CONFIG, Pictures, encoders, variables
from tests.evaluation.test_linear_probe import as_float64, mesh, reference

pytestmark = pytest.mark.usefixtures("one_device")

DIGITS = EvaluationSet("digits", Pictures(), CLASS_NAMES)


def splits():
    values, labels = load_digits(return_X_y=True)
    examples = Features((values / 16).astype(np.float32), labels)
    third = rank_in_class(labels, seed=0) % 3
    return Splits(DIGITS, *(examples[third == number] for number in range(3)))


def test_draws_have_so_many_of_each_class_and_contain_smaller_ones():
    train = splits().train
    for seed in SEEDS:
        for count in SHOTS:
            few = draw(train, count, seed)
            assert np.bincount(few.labels).tolist() == [count] * 10
        rows = {row.tobytes() for row in few.values}
        assert {row.tobytes() for row in draw(train, 4, seed).values} <= rows
    assert (draw(train, 1, 0).values != draw(train, 1, 1).values).any()


def test_the_curve_is_scikit_learns(monkeypatch):
    monkeypatch.setattr("clip_jax.evaluation.few_shot.SHOTS", (2, 8))
    data = splits()
    result = fit_shots(data, 0.25, mesh(), progress=False)
    assert result.shots == (2, 8) and result.accuracies.shape == (2, len(SEEDS))
    for row, (count, strength) in enumerate(zip(result.shots, result.strengths, strict=True)):
        for column, seed in enumerate(SEEDS):
            expected = reference(as_float64(draw(data.train, count, seed)), strength, 1e-4)
            score = expected.score(data.test.values, data.test.labels)
            assert abs(result.accuracies[row, column] - score) < 0.01
    metrics = result.metrics
    assert metrics["acc1"] == 0.25
    assert metrics["lp_acc1@8"] == pytest.approx(result.accuracies[1].mean()) and metrics["lp_acc1@8"] > 0.8
    assert few_shot_curve([result]).startswith("data:image/png;base64,")


def test_shots_that_a_class_lacks_are_left_out(monkeypatch, caplog):
    monkeypatch.setattr("clip_jax.evaluation.few_shot.SHOTS", (1, 2, 4))
    data = splits()
    rare = rank_in_class(data.train.labels, seed=1)
    fewer = Splits(DIGITS, data.train[(data.train.labels != 3) | (rare < 3)], data.validation, data.test)
    assert fit_shots(fewer, 0.1, mesh(), progress=False).shots == (1, 2)
    assert "digits: 2 shots at most, for so many examples has 'three'" in caplog.text
    none = Splits(DIGITS, data.train[data.train.labels != 3], data.validation, data.test)
    with pytest.raises(UserError, match="examples of every class to train on, got none of 'three'"):
        fit_shots(none, 0.1, mesh(), progress=False)


def test_the_probe_is_fitted_to_training_and_validation_examples():
    data = splits()
    result = fit_probe(data, mesh(), progress=False)
    expected = reference(as_float64(data.train + data.validation), result.strength, 1e-4)
    assert abs(result.metrics["lp_acc1"] - expected.score(data.test.values, data.test.labels)) < 0.006
    assert result.metrics["lp_acc1"] > 0.94 and result.metrics["lp_strength"] == result.strength


def test_a_fifth_of_each_class_is_the_validation_split(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))

    class Many(Pictures):
        def __len__(self):
            return 30

    dataset = EvaluationSet("pictures", Pictures(), ("a", "b", "c"), train=Many)
    found = extract_splits(encoders(), variables(), dataset, progress=False)
    assert [np.bincount(part.labels).tolist() for part in (found.train, found.validation)] == [[8] * 3, [2] * 3]
    too_few = EvaluationSet("pictures", Pictures(), ("a", "b", "c"), train=Pictures)
    with pytest.raises(UserError, match="expected at least 5 examples of some class"):
        extract_splits(encoders(), variables(), too_few, progress=False)
    given = EvaluationSet("pictures", Pictures(), ("a", "b", "c"), train=Many, validation=Pictures)
    found = extract_splits(encoders(), variables(), given, progress=False)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [30, 10, 10]


def test_class_folders_are_trained_on_those_beside_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    for split, classes in {"train": ("cat", "dog"), "test": ("cat", "dog"), "odd": ("cat", "cow")}.items():
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(6):
                Pictures()[number].image.save(tmp_path / split / name / f"{number}.png")
    dataset = evaluation_set(str(tmp_path / "test"))
    assert isinstance(dataset.train(), LabelledFolder) and evaluation_set(str(tmp_path / "train")).train is None
    assert len(extract_splits(encoders(), variables(), dataset, progress=False).train) == 10
    with pytest.raises(UserError, match=r"other classes than .*odd"):
        extract_splits(encoders(), variables(), evaluation_set(str(tmp_path / "odd")), progress=False)


def test_from_the_shell_to_a_row_of_strict_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("clip_jax.evaluation.few_shot.SHOTS", (1, 2))
    model_folder.write(tmp_path / "model", CONFIG, variables())
    output, page = tmp_path / "rows.json", tmp_path / "page.html"
    asked = ["--weights", str(tmp_path / "model"), "--datasets", "digits", "--tasks", "linear_probe,few_shot"]
    evaluate.main([*asked, "--output", str(output), "--report", str(page)])
    probe, shots = json.loads(output.read_text())
    assert (probe["task"], shots["task"]) == ("linear_probe", "few_shot")
    assert set(probe["metrics"]) == {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "lp_strength"}
    assert {"acc1", "lp_acc1@1", "lp_acc1_std@1", "lp_acc1@2"} <= set(shots["metrics"])
    assert "Linear probe" in page.read_text() and 'alt="accuracy against' in page.read_text()
    with pytest.raises(UserError, match="shapes_seen has no training split"):
        evaluate.main([*asked[:2], "--datasets", "shapes_seen", *asked[4:]])
