import numpy as np
import pytest

from clip_jax.data.order import mixture_index, sample_generator, sample_index
from clip_jax.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_each_sample_comes_once_per_epoch(size):
    indices = sample_index(7, np.arange(3 * size), size).reshape(3, size)
    np.testing.assert_array_equal(np.sort(indices, axis=1), np.tile(np.arange(size), (3, 1)))


def test_order_depends_on_nothing_but_seed_and_position():
    whole = sample_index(1, np.arange(5000), 777)
    scattered = np.random.default_rng(0).integers(0, 5000, 300)
    np.testing.assert_array_equal(sample_index(1, scattered, 777), whole[scattered])


def test_epochs_and_seeds_have_unrelated_orders():
    first, second = sample_index(1, np.arange(20_000), 10_000).reshape(2, -1)
    other_seed = sample_index(2, np.arange(10_000), 10_000)
    for other in (second, other_seed):
        assert (first == other).sum() < 10  # one agreement is expected by chance
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_a_shuffled_epoch_looks_random():
    size = 1000
    openings = sample_index(3, np.arange(10_000) * size, size)  # the first sample of each of 10,000 epochs
    counts = np.bincount(openings, minlength=size)
    chi_square = ((counts - 10) ** 2 / 10).sum()
    assert abs(chi_square - (size - 1)) < 5 * np.sqrt(2 * size)
    epoch = sample_index(3, np.arange(size), size)
    assert abs(np.corrcoef(epoch[:-1], epoch[1:])[0, 1]) < 0.1


def test_far_positions_are_reached_at_once():
    far = np.array([10**12, 10**12 + 1])
    indices = sample_index(0, far, 400_000_000)
    assert ((indices >= 0) & (indices < 400_000_000)).all()


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.2, 0.5, 0.3), (1.0, 1e-3, 7.0, 2.0)])
def test_mixture_has_its_proportions_in_any_window(weights):
    source, inside = mixture_index(np.arange(30_000), weights)
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    for start, stop in ((0, 4), (3, 250), (12_345, 12_399), (100, 29_999)):
        got = counts[stop] - counts[start]
        assert (np.abs(got - (stop - start) * shares) < 2).all()
    for number in range(len(weights)):
        np.testing.assert_array_equal(inside[source == number], np.arange((source == number).sum()))


def test_mixture_depends_on_position_only():
    whole = np.stack(mixture_index(np.arange(1000), (5.0, 3.0, 2.0)))
    scattered = np.random.default_rng(0).integers(0, 1000, 100)
    np.testing.assert_array_equal(np.stack(mixture_index(scattered, (5.0, 3.0, 2.0))), whole[:, scattered])


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 1e-9)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(UserError, match="weight"):
        mixture_index(np.arange(3), weights)


def test_generators_differ_by_seed_and_position_and_repeat():
    def draw(seed, position):
        return tuple(sample_generator(seed, position).integers(0, 2**62, 3))

    draws = {draw(seed, position) for seed in range(5) for position in (0, 1, 2, 10**12)}
    assert len(draws) == 20
    assert draw(3, 9) == draw(3, 9)
