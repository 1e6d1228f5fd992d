import pytest

from clip_jax.errors import UserError
from clip_jax.planner.topologies import GENERATIONS, parse_topology


# Shapes as Google's documentation of each generation lists them.
@pytest.mark.parametrize(
    "name, chips, shape, wrap",
    [
        ("v3-8", 4, (2, 2), (False, False, False)),
        ("v3-32", 16, (4, 4), (False, False, False)),
        ("v3-2048", 1024, (32, 32), (True, True, False)),
        ("v4-8", 4, (2, 2, 1), (False, False, False)),
        ("v4-16", 8, (2, 2, 2), (False, False, False)),
        ("v4-64", 32, (2, 4, 4), (False, False, False)),
        ("v4-512", 256, (4, 8, 8), (True, True, True)),
        ("v5p-128", 64, (4, 4, 4), (True, True, True)),
        ("v5p-384:4x4x12", 192, (4, 4, 12), (True, True, True)),
        ("v5e-1", 1, (1, 1), (False, False, False)),
        ("v5e-8", 8, (2, 4), (False, False, False)),
        ("v5e-128", 128, (8, 16), (False, True, False)),
        ("v6e-256", 256, (16, 16), (True, True, False)),
        ("2xv5e-256", 512, (16, 16), (True, True, False)),
        ("tpu7x-128", 64, (4, 4, 4), (True, True, True)),
    ],
)
def test_cloud_names(name, chips, shape, wrap):
    topology = parse_topology(name)
    assert (topology.chips, topology.shape) == (chips, shape)
    assert topology.description()["wrap"] == wrap
    assert topology.description()["num_slices"] == (2 if name.startswith("2x") else 1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("h100-8", "v5p-N"),
        ("v5e", "v5p-N"),
        ("v5e-512", "1 to 256"),
        ("v5e-0", "1 to 256"),
        ("0xv5e-4", "expected"),
        ("v4-7", "counted in 2 per chip"),
        ("v5p-384", "v5p-384:4x4x12"),
        ("v5p-384:4x4x8", "192 chips in 3 dimensions"),
        ("v5e-16:2x2x4", "16 chips in 2 dimensions"),
    ],
)
def test_other_names_say_what_is_known(name, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(
    "family, units, side",
    [("v3", 2, 128), ("v4", 8, 128), ("v5e", 4, 128), ("v5p", 8, 128), ("v6e", 4, 256), ("tpu7x", 4, 256)],
)
def test_clocks_times_matrix_units_give_the_published_peaks(family, units, side):
    device = GENERATIONS[family].device
    assert device.clock_hz * units * 2 * side**2 == pytest.approx(device.peak_flops, rel=2e-3)
