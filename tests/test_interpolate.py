"""WiSE-FT interpolation: the formula, bit for bit, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from clip_jax import interpolate, model_folder
from clip_jax.errors import UserError
from clip_jax.weights import load_variables
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The paths of two models, and a function that names a new one."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        model_folder.write(root / name, tiny.RESNET, tiny.variables(tiny.RESNET, seed))
    return str(root / "a"), str(root / "b"), lambda name: str(root / name)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_interpolated_weights_are_the_formula_bit_for_bit(folders, alpha):
    """wise-ft's own line, in PyTorch: {key: (1 - alpha) * theta_0[key] + alpha * theta_1[key]}."""
    a, b, new = folders
    interpolate.main([a, b, new(f"at {alpha}"), f"--alpha={alpha}"])
    config, got = load_variables(new(f"at {alpha}"))
    assert config == tiny.RESNET and "batch_stats" in got
    for x, y, z in zip(
        *(jax.tree.leaves(load_variables(path)[1]) for path in (a, b)), jax.tree.leaves(got), strict=True
    ):
        theta_0, theta_1 = map(torch.from_numpy, (x, y))
        assert np.array_equal(z, ((1 - alpha) * theta_0 + alpha * theta_1).numpy())


def test_other_architectures_are_refused_by_the_difference(folders, tmp_path):
    a, _, new = folders
    for config, message in (
        (tiny.VIT, "has vision.layers="),
        (dataclasses.replace(tiny.RESNET, activation="gelu"), "has activation='quick_gelu' and .* has 'gelu'"),
    ):
        other = tmp_path / message[:20].replace(" ", "")
        model_folder.write(other, config, tiny.variables(config))
        with pytest.raises(UserError, match=message):
            interpolate.main([a, str(other), new("never")])


@pytest.mark.parametrize("alpha", ["1.5", "nan"])
def test_an_alpha_outside_is_refused(folders, alpha):
    a, b, new = folders
    with pytest.raises(UserError, match="--alpha must be from 0 to 1"):
        interpolate.main([a, b, new("never"), "--alpha", alpha])


def test_a_folder_that_exists_is_not_overwritten(folders):
    a, b, _ = folders
    with pytest.raises(UserError, match="exists already"):
        interpolate.main([a, b, a])
