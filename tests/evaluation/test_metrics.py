"""Against scikit-learn, and against definitions written out in exact fractions."""

from fractions import Fraction

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


def test_blocks_change_nothing(scores_and_labels, monkeypatch):
    whole = metrics.classification_metrics(*scores_and_labels)
    for block in (1, 20, 2100):  # under a row, not a whole number of rows, all
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert metrics.classification_metrics(*scores_and_labels) == whole
    scores, labels = scores_and_labels
    scores = scores.copy()
    scores[[0, 299], 3] = np.nan
    monkeypatch.setattr(metrics, "_BLOCK", 20)
    with pytest.raises(UserError, match="2 of 2,100 are NaN"):
        metrics.accuracy(scores, labels)


def test_classes_without_an_image_do_not_count():
    scores = np.eye(6, dtype=np.float32)[[0, 0, 4, 5]]
    labels = np.array([0, 4, 4, 4])
    assert metrics.mean_per_class_recall(scores, labels) == pytest.approx((1 + 1 / 3) / 2)


def test_one_class():
    scores, labels = np.ones((3, 1), np.float32), np.zeros(3, int)
    assert metrics.classification_metrics(scores, labels) == {"acc1": 1, "mean_per_class_recall": 1}


def test_top_5_of_few_classes_is_an_error_where_it_is_asked_for(scores_and_labels):
    scores, labels = scores_and_labels
    few, labels = scores[:, :4], labels % 4
    for name in ("acc5", "mean_acc1_acc5"):
        with pytest.raises(UserError, match="top-5 accuracy needs at least 5 classes, got 4"):
            metrics.METRICS[name](few, labels)


def test_kinetics(scores_and_labels):
    scores, labels = scores_and_labels
    parts = [top_k_accuracy_score(labels, scores, k=k, labels=range(7)) for k in (1, 5)]
    assert metrics.mean_of_top1_and_top5(scores, labels) == pytest.approx(np.mean(parts))


def test_a_data_set_has_its_own_metric_beside_the_usual_ones(scores_and_labels):
    usual = metrics.classification_metrics(*scores_and_labels)
    got = metrics.classification_metrics(*scores_and_labels, "mean_acc1_acc5")
    assert got == {**usual, "mean_acc1_acc5": (usual["acc1"] + usual["acc5"]) / 2}
    assert metrics.classification_metrics(*scores_and_labels, "mean_per_class_recall") == usual
    targets = np.eye(7, dtype=bool)[scores_and_labels[1]]
    assert list(metrics.classification_metrics(scores_and_labels[0], targets, "mean_average_precision")) == [
        "mean_average_precision"
    ]


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_roc_auc_is_the_share_of_pairs_in_order(levels):
    """Mann and Whitney's definition, with a half for ties; few levels give many of them."""
    generator = np.random.default_rng(levels)
    labels = generator.integers(0, 2, 60)
    scores = generator.integers(0, levels, (60, 2)).astype(np.float32) / 8
    lean = [Fraction(float(one)) - Fraction(float(nought)) for nought, one in scores]
    pairs = [(lean[i], lean[j]) for i in np.flatnonzero(labels) for j in np.flatnonzero(labels == 0)]
    expected = sum(Fraction(a > b) + Fraction(a == b, 2) for a, b in pairs) / len(pairs)
    assert metrics.roc_auc(scores, labels) == pytest.approx(float(expected), abs=1e-12)


def test_roc_auc_needs_both_classes():
    with pytest.raises(UserError, match="both classes, got class 1 only"):
        metrics.roc_auc(np.ones((3, 2), np.float32), np.ones(3, int))


def eleven_points(scores, positive):
    """VOC2007's definition: at each of 11 recalls, the best precision of any threshold that reaches it."""
    operating_points = []
    for threshold in scores:
        taken = scores >= threshold
        found = int((taken & positive).sum())
        operating_points.append((Fraction(found, int(positive.sum())), Fraction(found, int(taken.sum()))))
    points = [Fraction(tenth, 10) for tenth in range(11)]
    return sum(max(precision for recall, precision in operating_points if recall >= point) for point in points) / 11


@pytest.mark.parametrize("levels", [1, 3, 10**6])
@pytest.mark.parametrize("share", [0.05, 0.5, 1])
def test_mean_average_precision(levels, share):
    """Ten positives have recalls that binary fractions miss; with one level all images are tied."""
    generator = np.random.default_rng(levels)
    scores = generator.integers(0, levels, (40, 4)).astype(np.float32)
    targets = generator.random((40, 4)) < share
    targets[:, 1], targets[:, 2] = np.arange(40) % 4 == 0, False  # ten positives; none, which does not count
    expected = [eleven_points(scores[:, k], targets[:, k]) for k in range(4) if targets[:, k].any()]
    assert metrics.mean_average_precision(scores, targets) == pytest.approx(float(sum(expected) / len(expected)))
    order = generator.permutation(40)
    again = metrics.mean_average_precision(scores[order], targets[order])
    assert again == metrics.mean_average_precision(scores, targets)


def test_interpolation_is_not_plain_average_precision():
    """A worked example: positives at places 1, 3 and 4 of four."""
    scores, positive = np.array([[4.0], [3.0], [2.0], [1.0]], np.float32), np.array([[True], [False], [True], [True]])
    assert metrics.mean_average_precision(scores, positive) == pytest.approx((4 * 1 + 7 * 3 / 4) / 11)


def test_nothing_to_find_is_an_error():
    with pytest.raises(UserError, match="shows one of the classes, got none"):
        metrics.mean_average_precision(np.ones((3, 2), np.float32), np.zeros((3, 2), bool))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mean_average_precision", "roc_auc"])
def test_binary_scores_that_are_not_finite_are_an_error(name, value):
    scores, targets = np.ones((4, 2), np.float32), np.eye(2, dtype=bool)[[0, 1, 0, 1]]
    scores[2, 1] = value
    with pytest.raises(UserError, match="1 of 8 are NaN or infinite"):
        metrics.METRICS[name](scores, targets if name == "mean_average_precision" else targets.argmax(axis=1))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_no_example_is_an_error(name):
    labels = np.zeros((0, 2), bool) if name == "mean_average_precision" else np.zeros(0, int)
    with pytest.raises(UserError, match="at least one example, got none"):
        metrics.METRICS[name](np.zeros((0, 2), np.float32), labels)


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
