"""The linear probe: its classifier is scikit-learn's, its search the exhaustive one's, its features the reference's."""

import functools
import warnings

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Reference
from threadpoolctl import threadpool_limits

from clip_jax.errors import UserError
from clip_jax.evaluation.features import Features
from clip_jax.evaluation.linear_probe import PER_DECADE, choose_strength, rank_in_class, search, strength_of
from clip_jax.evaluation.logistic import LogisticRegression
from clip_jax.parallel import MeshConfig, make_partitioner

NUMBERS = range(-6 * PER_DECADE, 6 * PER_DECADE + 1)


@functools.cache
def mesh(devices=1):
    return make_partitioner(MeshConfig(), jax.devices()[:devices])


@functools.cache
def digits():
    """Two halves: features from 0 to 1, as float32, with labels."""
    values, labels = load_digits(return_X_y=True)
    examples = Features((values / 16).astype(np.float32), labels)
    odd = rank_in_class(labels, seed=0) % 2 == 1
    return examples[~odd], examples[odd]


def as_float64(examples):
    return Features(examples.values.astype(np.float64), examples.labels)


def reference(train, strength, tolerance):
    with warnings.catch_warnings(), threadpool_limits(1):  # its threads would wait in a loop for a free core
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Reference(C=1 / strength, max_iter=1000, tol=tolerance).fit(train.values, train.labels)


def centred(weights):
    """Without what is the same for all classes, which changes no probability."""
    return weights - weights.mean(axis=-1, keepdims=True)


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def accuracy(scores, labels):
    return (scores.argmax(axis=1) == labels).mean()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strength", [1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6])
def test_as_accurate_as_scikit_learn_at_every_strength(strength, dtype):
    train, test = digits()
    with jax.enable_x64(dtype == "float64"):
        ours = LogisticRegression(train.values.astype(dtype), train.labels, 10, mesh()).fit(strength)
    found = accuracy(ours.scores(test.values), test.labels)
    expected = reference(as_float64(train), strength, 1e-4).score(test.values, test.labels)
    # One of 896 images; where rounding leads L-BFGS another way before it has converged, a few.
    assert abs(found - expected) <= (0.002 if dtype == "float64" else 0.005)


@pytest.mark.parametrize("strength", [1.0, 1e2, 1e4, 1e6])
def test_the_coefficients_are_scikit_learns_at_convergence(strength):
    train, _ = digits()
    ours = LogisticRegression(train.values, train.labels, 10, mesh()).fit(strength, tolerance=1e-8)
    expected = reference(as_float64(train), strength, 1e-8)
    assert distance(centred(ours.weights), centred(expected.coef_.T)) < 1e-3
    assert distance(centred(ours.bias), centred(expected.intercept_)) < 2e-2  # scikit-learn's own float32: up to 1


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_in_float64_every_step_is_scikit_learns(strength):
    train, _ = digits()
    with jax.enable_x64(True):
        wide = as_float64(train)
        ours = LogisticRegression(wide.values, wide.labels, 10, mesh()).fit(strength)
        assert ours.weights.dtype == np.float64
    assert distance(ours.weights, reference(wide, strength, 1e-4).coef_.T) < 1e-6


@pytest.mark.parametrize("devices", [2, 8])
def test_the_number_of_devices_changes_nothing(devices):
    train, _ = digits()
    train = train[np.arange(len(train)) < 301]  # what no number of devices divides
    one, several = (
        LogisticRegression(train.values, train.labels, 10, mesh(count)).fit(1e-6, 200) for count in (1, devices)
    )
    np.testing.assert_array_equal(several.weights, one.weights)


def test_more_examples_than_a_step_takes(monkeypatch):
    train, _ = digits()
    whole = LogisticRegression(train.values, train.labels, 10, mesh()).fit(1.0, 20)
    monkeypatch.setattr("clip_jax.evaluation.logistic._ROWS", 64)
    steps = LogisticRegression(train.values, train.labels, 10, mesh()).fit(1.0, 20)
    assert distance(steps.weights, whole.weights) < 1e-3


@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e2])
def test_two_classes_are_regularised_as_scikit_learn_does(strength):
    train, test = (split[split.labels < 2] for split in digits())
    ours = LogisticRegression(train.values, train.labels, 2, mesh()).fit(strength, tolerance=1e-8)
    expected = reference(as_float64(train), strength, 1e-8)
    assert distance(ours.weights[:, 1] - ours.weights[:, 0], expected.coef_[0]) < 5e-3
    np.testing.assert_array_equal(ours.scores(test.values).argmax(axis=1), expected.predict(test.values))


def test_classes_without_examples_come_last():
    train, test = digits()
    some = train[(train.labels != 3) & (train.labels != 9)]
    ours = LogisticRegression(some.values, some.labels, 12, mesh()).fit(1.0)
    scores = ours.scores(test.values)
    assert scores.shape == (len(test), 12) and np.isfinite(scores).all()
    trained = [0, 1, 2, 4, 5, 6, 7, 8]
    assert (scores[:, trained].min(axis=1) > np.delete(scores, trained, axis=1).max(axis=1)).all()
    agree = scores.argmax(axis=1) == reference(as_float64(some), 1.0, 1e-4).predict(test.values)
    assert agree.mean() > 0.995


def test_constant_features_leave_the_frequencies_of_the_classes():
    labels = np.array([0, 1, 1, 2, 2, 2])
    ours = LogisticRegression(np.ones((6, 4), np.float32), labels, 3, mesh()).fit(1e3, tolerance=1e-6)
    shares = np.exp(log_softmax(ours.scores(np.ones((1, 4), np.float32)), axis=1))
    np.testing.assert_allclose(shares, [[1 / 6, 2 / 6, 3 / 6]], atol=1e-2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values, labels: (values, np.zeros_like(labels)), "at least 2 classes, got 1"),
        (lambda values, labels: (np.where(values > 0.9, np.nan, values), labels), "finite features, but .* NaN"),
        (lambda values, labels: (np.where(values > 0.9, np.inf, values), labels), "finite features, but .* NaN"),
        (lambda values, labels: (values, labels - 1), r"labels from 0 to 9, but .* \(-1 among them\)"),
        (lambda values, labels: (values, labels + 1), r"labels from 0 to 9, but .* \(10 among them\)"),
        (lambda values, labels: (values[:0], labels[:0]), "at least 2 classes, got 0"),
    ],
)
def test_what_no_classifier_can_be_fitted_to_is_refused(spoil, message):
    values, labels = spoil(digits()[0].values, digits()[0].labels)
    with pytest.raises(UserError, match=message):
        LogisticRegression(values.astype(np.float32), labels, 10, mesh())


def test_the_search_finds_every_peak_with_few_questions():
    for peak in NUMBERS:
        asked = []

        def quality(strength, peak=peak, asked=asked):
            asked.append(strength)
            return -abs(np.log10(strength) - peak / PER_DECADE)

        assert search(quality) == strength_of(peak)
        assert len(asked) == len(set(asked)) <= 7 + 2 * 4
        assert min(asked) == 1e-6 and max(asked) == 1e6


def test_the_search_finds_what_all_96_steps_find_on_digits():
    examples, _ = digits()
    held_out = rank_in_class(examples.labels, seed=0) % 4 == 3
    train, validation = examples[~held_out], examples[held_out]
    with jax.enable_x64(True):
        train, validation = as_float64(train), as_float64(validation)
        regression = LogisticRegression(train.values, train.labels, 10, mesh())

        def quality(strength):
            scores = regression.fit(strength).scores(validation.values)
            loss = -log_softmax(scores, axis=1)[np.arange(len(scores)), validation.labels].mean()
            return accuracy(scores, validation.labels), -loss

        best = max(map(strength_of, NUMBERS), key=quality)
        assert choose_strength(train, validation, 10, mesh()) == best


def test_ranks_within_classes_are_permutations_that_seeds_decide():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    first, again, other = (rank_in_class(labels, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    for label in range(5):
        np.testing.assert_array_equal(np.sort(first[labels == label]), np.arange((labels == label).sum()))
