"""Sums that no order changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.evaluation.exact_sum import ExactSum


@pytest.mark.parametrize("spread", [0, 12])
def test_no_order_changes_the_sum_and_little_is_lost(spread):
    generator = np.random.default_rng(0)
    arrays = (generator.normal(size=(50, 7)) * 2.0 ** generator.integers(-spread, 1, (50, 7))).astype(np.float32)
    bound = float(np.abs(arrays).sum(axis=0, dtype=np.float64).max())
    exact = ExactSum(bound, len(arrays), np.float32)

    def total(order):
        parts = exact.zeros_like(jnp.zeros(7))
        for number in order:
            parts = exact.add(parts, jnp.asarray(arrays[number]))
        return exact.value(tuple(map(np.asarray, parts)))

    first = total(range(50))
    np.testing.assert_allclose(first, arrays.sum(axis=0, dtype=np.float64), rtol=0, atol=bound * 2.0**-45)
    for seed in range(5):
        np.testing.assert_array_equal(total(np.random.default_rng(seed).permutation(50)), first)


def test_the_largest_sum_does_not_overflow():
    largest = np.float64(np.float32(124.99999))
    for sign in (1, -1):
        exact = ExactSum(1000.0, 8, np.float32)
        parts = exact.zeros_like(jnp.zeros(1))
        for _ in range(8):
            parts = exact.add(parts, jnp.full(1, sign * largest))
        np.testing.assert_allclose(exact.value(tuple(map(np.asarray, parts))), sign * 8 * largest)
