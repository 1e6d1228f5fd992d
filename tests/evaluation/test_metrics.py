"""Against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from clip_jax.errors import UserError
from clip_jax.evaluation import metrics


@pytest.fixture(scope="module")
def scores_and_labels():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 7, 300)
    scores = generator.normal(size=(300, 7)) + 1.5 * np.eye(7)[labels]
    return scores.astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 2, 5])
def test_accuracy(scores_and_labels, k):
    scores, labels = scores_and_labels
    assert metrics.accuracy(scores, labels, k) == pytest.approx(
        top_k_accuracy_score(labels, scores, k=k, labels=range(7))
    )


def test_ties_go_to_the_lower_class_as_argmax_does():
    scores = np.zeros((3, 4), np.float32)
    labels = np.array([0, 1, 3])
    assert metrics.accuracy(scores, labels) == pytest.approx(1 / 3)
    assert metrics.accuracy(scores, labels, k=2) == pytest.approx(2 / 3)


def test_mean_per_class_recall_and_confusion(scores_and_labels):
    scores, labels = scores_and_labels
    predictions = scores.argmax(axis=1)
    assert metrics.mean_per_class_recall(scores, labels) == pytest.approx(balanced_accuracy_score(labels, predictions))
    np.testing.assert_array_equal(metrics.confusion_matrix(scores, labels), confusion_matrix(labels, predictions))


def test_a_metric_that_does_not_exist_is_left_out(scores_and_labels):
    scores, labels = scores_and_labels
    assert set(metrics.classification_metrics(scores, labels)) == {"acc1", "acc5", "mean_per_class_recall"}
    few = metrics.classification_metrics(scores[:, :3], np.minimum(labels, 2))
    assert set(few) == {"acc1", "mean_per_class_recall"}


METRICS = (metrics.accuracy, metrics.mean_per_class_recall, metrics.confusion_matrix, metrics.classification_metrics)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_an_error(scores_and_labels, metric, value):
    scores, labels = scores_and_labels
    scores = scores.copy()
    scores[3:5] = value
    with pytest.raises(UserError, match="14 of 2,100 are NaN or infinite"):
        metric(scores, labels)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_that_is_no_class_is_an_error(scores_and_labels, metric, label):
    scores, labels = scores_and_labels
    labels = labels.copy()
    labels[2] = label
    with pytest.raises(UserError, match=f"labels from 0 to 6, but 1 of 300 are not .{label} among"):
        metric(scores, labels)
