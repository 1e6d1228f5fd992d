"""Which process reads which examples."""

import jax
import numpy as np
import pytest

from clip_jax.evaluation import division
from clip_jax.evaluation.division import divide, divide_evenly, readers, rows_per_device
from clip_jax.parallel import MeshConfig, make_partitioner


@pytest.fixture
def hosts(monkeypatch):
    """Make believe that the 8 pieces of a batch lie on devices of these processes, seen from one of them."""

    def pretend(holders, process=0):
        monkeypatch.setattr(division, "_holders", lambda partitioner: holders)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return make_partitioner(MeshConfig())

    return pretend


@pytest.mark.parametrize("count", [1, 2, 3, 100, 511, 512, 513, 2000])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_example_is_read_once_and_each_process_reads_a_stretch(count, processes, hosts):
    holders = [{piece * processes // 8} for piece in range(8)]
    stretches = []
    for process in range(processes):
        found = divide_evenly(count, hosts(holders, process))
        own = found.own_examples[found.own_examples >= 0]
        np.testing.assert_array_equal(own, np.arange(len(own)) + (own[0] if len(own) else 0))
        stretches.append(own)
    assert np.concatenate(stretches).tolist() == list(range(count))
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1
    numbers = found.examples[found.examples >= 0]
    assert sorted(numbers.tolist()) == list(range(count))
    assert found.examples.shape[2] == rows_per_device(count)


def test_pieces_in_any_order(hosts):
    found = divide([3, 2], 2, hosts([{1}, {0}, {1}, {0}, {1}, {0}, {1}, {0}], process=1))
    assert found.own == (0, 2, 4, 6)
    assert found.own_examples.tolist() == [[3, 4, -1, -1, -1, -1, -1, -1]]


def test_processes_that_hold_the_same_pieces_read_the_same(hosts):
    holders = [{0, 1}] * 4 + [{2, 3}] * 4
    assert readers(hosts(holders)) == {0: [0, 1, 2, 3], 2: [4, 5, 6, 7]}
    first, second = (divide_evenly(100, hosts(holders, process)).own_examples for process in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_few_rows_are_cut_into_batches_of_few_sizes():
    assert [rows_per_device(count) for count in (0, 1, 2, 3, 33, 64, 65, 10**6)] == [1, 1, 2, 4, 64, 64, 64, 64]
