import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.order import (
    Windows,
    mixture_index,
    replacement_index,
    sample_generator,
    sample_index,
    windowed_index,
)
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


# Sizes that permutations of powers of four have failed at elsewhere, and sizes that nothing divides.
SIZES = st.one_of(st.integers(1, 3000), st.sampled_from([4095, 4096, 4097, 16_385, 65_537, 10_007]))
WINDOWS = st.builds(Windows, st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 2, 3, 8]))
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=150)
@given(seed=SEEDS, size=SIZES, windows=WINDOWS, batch_size=st.integers(1, 2000), epoch=st.sampled_from([0, 1, 77]))
def test_windows_hold_each_sample_once_per_epoch_and_any_position_is_reached_at_once(
    seed, size, windows, batch_size, epoch
):
    positions = np.arange(epoch * size, (epoch + 1) * size)
    whole = windowed_index(seed, positions, size, windows, batch_size)
    np.testing.assert_array_equal(np.sort(whole), np.arange(size))
    scattered = np.random.default_rng(seed).integers(0, size, 20)
    np.testing.assert_array_equal(
        windowed_index(seed, positions[scattered], size, windows, batch_size), whole[scattered]
    )
    if size > 50:
        again = windowed_index(seed, positions + size, size, windows, batch_size)
        assert (whole != again).any()


@settings(max_examples=60)
@given(seed=SEEDS, size=SIZES, epoch=st.integers(0, 1000))
def test_any_size_comes_once_per_epoch(seed, size, epoch):
    indices = sample_index(seed, np.arange(epoch * size, (epoch + 1) * size), size)
    np.testing.assert_array_equal(np.sort(indices), np.arange(size))


@settings(max_examples=60)
@given(
    seed=SEEDS, windows=WINDOWS, hosts=st.sampled_from([1, 2, 4, 8]), local=st.integers(1, 40), step=st.integers(0, 99)
)
def test_hosts_share_a_batch_that_does_not_depend_on_their_number(seed, windows, hosts, local, step):
    size, batch_size = 5003, 8 * local
    whole = windowed_index(seed, np.arange(step * batch_size, (step + 1) * batch_size), size, windows, batch_size)
    share = batch_size // hosts
    parts = [
        windowed_index(seed, step * batch_size + host * share + np.arange(share), size, windows, batch_size)
        for host in range(hosts)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_host_reads_its_own_blocks():
    windows, batch_size, size = Windows(16, 8, 8), 64, 50_000
    span = 16 * 8 * 8
    order = windowed_index(5, np.arange(4 * span), size, windows, batch_size).reshape(-1, 8, batch_size // 8)
    for first in range(0, len(order), span // batch_size):
        window = order[first : first + span // batch_size] // 16
        blocks = [set(window[:, lane].ravel().tolist()) for lane in range(8)]
        assert len(set.union(*blocks)) == sum(map(len, blocks)) == 8 * 8


def test_windows_mix_neighbours():
    size, windows = 100_000, Windows(64, 16, 4)
    order = windowed_index(1, np.arange(size), size, windows, 256)
    distance = np.abs(np.diff(np.argsort(order)))
    window = 64 * 16 * 4  # positions over which the samples of a lane's window are spread
    assert 0.25 * window < np.median(distance) < 0.4 * window  # a third, on average, where places are independent


def test_stand_ins_are_a_function_of_the_position_and_even():
    drawn = np.array([replacement_index(3, position, 0, 10) for position in range(4000)])
    assert (np.abs(np.bincount(drawn, minlength=10) - 400) < 5 * np.sqrt(360)).all()
    assert drawn[7] == replacement_index(3, 7, 0, 10)
    tries = [replacement_index(3, 7, attempt, 1000) for attempt in range(20)]
    assert len(set(tries)) > 15


def test_windowed_order_never_changes():
    """Runs that are under way must go on with the order they began with."""
    got = windowed_index(42, np.array([0, 1, 2, 63, 64, 4096, 10**9]), 65_537, Windows(8, 4, 2), 64)
    assert got.tolist() == [28447, 8147, 8151, 48691, 56981, 47144, 14185]
    assert [replacement_index(42, 1000, attempt, 65_537) for attempt in range(3)] == [46560, 22309, 25144]
