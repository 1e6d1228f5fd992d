"""Low-rank adapters: the formula, what they leave alone, and runs that were killed."""

import dataclasses
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from clip_jax import model_folder
from clip_jax.errors import UserError
from clip_jax.models import variable_shapes
from clip_jax.parallel import MeshConfig
from clip_jax.planner.duration import describe
from clip_jax.planner.flops import train_flops
from clip_jax.training.adapters import AdapterConfig, adapted_paths, initial_adapters, merged
from clip_jax.training.config import make_training
from clip_jax.training.initial_weights import InitialWeights
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.training.run import run
from clip_jax.training.state import state_shardings
from clip_jax.weights import load_variables
from tests import tiny
from tests.training.test_run import CONFIG

RANK, SCALE = 2, 3.0
# A kernel of each kind: shape, names of its axes, and how many of them are inputs, blocks aside.
KERNELS = {
    "text/transformer/resblocks/attn/query/kernel": ((2, 8, 4, 3), ("layers", "embed", "heads", "head_dim"), 1),
    "text/transformer/resblocks/attn/out/kernel": ((2, 4, 3, 8), ("layers", "heads", "head_dim", "embed"), 2),
    "visual/transformer/resblocks/mlp/c_fc/kernel": ((2, 8, 20), ("layers", "embed", "mlp"), 1),
    "visual/attnpool/v_proj/kernel": ((8, 4, 3), ("embed", "heads", "head_dim"), 1),
    "visual/layer1_0/conv2/kernel": ((3, 3, 4, 6), ("kernel_height", "kernel_width", "channels_in", "channels"), 3),
    "visual/proj": ((8, 5), ("embed", "projection"), 1),
}


@pytest.mark.parametrize("path", KERNELS)
def test_merged_and_unmerged_predictions_are_equal(path):
    """x (W + s A B) = x W + s (x A) B, block by block, with the heads folded into one axis."""
    shape, names, inputs = KERNELS[path]
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=shape).astype(np.float32)
    tree = unflatten_dict({path: nn.LogicallyPartitioned(jnp.asarray(kernel), names)}, sep="/")
    born = initial_adapters(AdapterConfig(RANK, RANK * SCALE), tree, jax.random.key(0))
    np.testing.assert_array_equal(flat(merged(nn.unbox(born), SCALE))[path], kernel)
    boxes = flat(born.factors)
    stacked = int(names[0] == "layers")
    middle = stacked + inputs
    assert boxes[f"{path}/a"].names == (*names[:middle], None)
    assert boxes[f"{path}/b"].names == (*names[:stacked], None, *names[middle:])
    a, b = (np.asarray(boxes[f"{path}/{name}"].unbox()) for name in "ab")
    fan_in = np.prod(shape[stacked:middle])
    assert 0.5 * fan_in**-0.5 < np.abs(a).max() <= fan_in**-0.5 and not b.any()

    b = generator.normal(size=b.shape).astype(np.float32)
    factors = unflatten_dict({f"{path}/a": jnp.asarray(a), f"{path}/b": jnp.asarray(b)}, sep="/")
    whole = np.asarray(flat(merged(nn.unbox(born).replace(factors=factors), SCALE))[path])
    assert whole.shape == shape
    blocks, x = shape[0] if stacked else 1, generator.normal(size=(5, fan_in))
    for w, w0, left, right in zip(
        whole.reshape(blocks, fan_in, -1),
        kernel.reshape(blocks, fan_in, -1),
        a.reshape(blocks, fan_in, RANK),
        b.reshape(blocks, RANK, -1),
        strict=True,
    ):
        np.testing.assert_allclose(x @ w, x @ w0 + SCALE * (x @ left) @ right, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The model that a run starts from, its configuration, its workdir and its last state."""
    root = tmp_path_factory.mktemp("adapted")
    variables = tiny.variables(CONFIG.model)
    model_folder.write(root / "source", CONFIG.model, variables)
    config = dataclasses.replace(
        CONFIG,
        init=InitialWeights(str(root / "source")),
        adapters=AdapterConfig(rank=2, alpha=8.0, kernels=("*/query/kernel", "*/out/kernel", "visual/proj")),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, warmup_steps=1, learning_rates={"*/b": 4.0}, weight_decays={"*/a": 0.5}, layer_decay=0.7
        ),
        ema_decay=0.9,
        total_steps=4,
        checkpoint_every=2,
    )
    return variables, config, root / "run", run(config, str(root / "run"))


def test_only_the_factors_learn_and_only_they_have_moments(adapted):
    variables, config, workdir, state = adapted
    before, after = flat(variables["params"]), flat(state.params)
    chosen = set(adapted_paths(config.adapters, variables["params"]))
    assert chosen == {path for path in before if path.endswith(("query/kernel", "out/kernel")) or path == "visual/proj"}
    for path, leaf in after.items():
        assert np.array_equal(leaf, before[path]) == (path not in chosen), path
    factors = flat(state.adapters.factors)
    assert factors.keys() == {f"{path}/{name}" for path in chosen for name in "ab"}
    assert all(np.any(leaf) for leaf in factors.values())
    for path, leaf in flat(state.adapters.base).items():
        assert np.array_equal(leaf, before[path]) and path in chosen
    learned = [leaf.shape for leaf in factors.values()]
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(learned * 2)
    for path, leaf in flat(merged(state.adapters, 4.0)).items():
        np.testing.assert_array_equal(leaf, after[path])
    for leaf, path in ((leaf, path) for path, leaf in flat(state.ema).items()):
        assert path in chosen and not np.array_equal(leaf, after[path])
    for name, expected in ((workdir, state.variables), (f"{workdir}@ema", state.ema_variables)):
        jax.tree.map(np.testing.assert_array_equal, load_variables(name)[1], jax.device_get(expected))


def test_a_killed_run_goes_on_bit_for_bit_and_over_another_mesh(adapted, tmp_path):
    _, config, workdir, state = adapted
    for mesh in (config.mesh, MeshConfig(2, 2, 2)):
        copy = tmp_path / str(mesh.fsdp)
        shutil.copytree(workdir, copy)
        shutil.rmtree(copy / "checkpoints" / "4")
        again = run(dataclasses.replace(config, mesh=mesh), str(copy))
        for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(again), jax.tree.leaves(state), strict=True):
            if mesh == config.mesh or "base" in jax.tree_util.keystr(path):
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
            else:
                np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-5)


def test_factors_are_split_like_their_kernels():
    adapters = AdapterConfig(rank=2, kernels=("visual/*/query/kernel", "visual/*/out/kernel"))
    config = dataclasses.replace(CONFIG, init=InitialWeights("MODEL"), adapters=adapters, mesh=MeshConfig(2, 2, 2))
    training = make_training(config)
    shardings = flat(state_shardings(training).adapters.factors)
    blocks = "visual/transformer/resblocks/attn"
    assert shardings[f"{blocks}/query/kernel/a"].spec == PartitionSpec(None, "fsdp")
    assert shardings[f"{blocks}/query/kernel/b"].spec == PartitionSpec(None, None, "tensor")
    assert shardings[f"{blocks}/out/kernel/a"].spec == PartitionSpec(None, "tensor")
    assert shardings[f"{blocks}/out/kernel/b"].spec == PartitionSpec(None, None, "fsdp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": ("visual/attn/*",)}, "'visual/attn/\\*' matches no matrix of the model, such as visual/"),
        ({"kernels": ("*/bias",)}, "matches no matrix of the model"),
        ({"kernels": ("*/token_embedding",)}, "matches no matrix of the model"),
        ({"rank": 65}, "adapters.rank is 65, but .*/query/kernel has at most rank 64"),
        ({"rank": -1}, "adapters.rank must be at least 0, got -1"),
        ({"alpha": 0.0}, "adapters.alpha must be above 0"),
        ({"kernels": ()}, "adapters.kernels names no kernel"),
        ({"init": InitialWeights()}, "say which with init_from"),
        ({"optimizer": OptimizerConfig(frozen=("text/*",))}, "leave optimizer.frozen empty"),
        (
            {"optimizer": OptimizerConfig(warmup_steps=1, learning_rates={"text/ln_final/*": 0.5})},
            "matches no parameter that is trained",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused(changes, message):
    fields = {name: changes.pop(name) for name in list(changes) if name in ("init", "optimizer")}
    with pytest.raises(UserError, match=message):
        config = {"init": InitialWeights("MODEL"), "adapters": AdapterConfig(**{"rank": 2, **changes}), **fields}
        state_shardings(make_training(dataclasses.replace(CONFIG, **config)))


def test_a_resnets_statistics_stay_and_its_kernels_can_be_adapted():
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(tiny.RESNET, text=CONFIG.model.text),
        init=InitialWeights("MODEL"),
        adapters=AdapterConfig(rank=1, kernels=("visual/attnpool/*/kernel", "visual/layer*/conv1/kernel")),
    )
    training = make_training(config)
    assert training.running_statistics
    shapes = flat(variable_shapes(config.model)["params"])
    trained = {path for path in shapes if path not in training.frozen}
    assert any("attnpool/q_proj" in path for path in trained) and any("layer1" in path for path in trained)
    assert train_flops(config) < train_flops(dataclasses.replace(config, adapters=AdapterConfig()))
    assert "frozen image tower" not in describe(config, images_per_second=10.0, examples=100, judged=10)


def flat(tree):
    return flatten_dict(tree, sep="/")
