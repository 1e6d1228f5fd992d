"""The train step: the same on every mesh and for every number of micro-batches, and able to learn."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from clip_jax.errors import UserError
from clip_jax.losses import LOSSES, SOFTMAX
from clip_jax.models import CLIP, Execution, abstract_inputs, normalize, transformer
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.planner.hlo import parse
from clip_jax.processing import Preprocess
from clip_jax.training.config import RunConfig, make_training
from clip_jax.training.loop import to_devices
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import Training, abstract_state, abstract_variables, initial_state
from clip_jax.training.step import encode, make_train_step
from tests import tiny

BATCH = 16
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
TILED = dataclasses.replace(SOFTMAX, tile=3)


def over(*sizes):
    return make_partitioner(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def training_of(config, partitioner, optimizer=None, execution=Execution(), **fields):  # noqa: B008
    optimizer = optimizer or make_optimizer(OPTIMIZER, 100)
    return Training(CLIP(config, execution), optimizer, partitioner, **fields)


def run(config, partitioner, execution=Execution()):  # noqa: B008
    """(losses, last state) of a few steps on the same batches."""
    training = training_of(config, partitioner, execution=execution, loss=TILED)
    state, train_step = initial_state(training, seed=0), make_train_step(training)
    losses = []
    for step in range(4):
        state, metrics = train_step(state, to_devices(tiny.batch(config, BATCH, seed=step), partitioner))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@functools.cache
def on_one_device(config):
    losses, state = run(config, over(1, 1, 1))
    return losses, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1)], ids=str)
def test_a_vit_learns_the_same_on_every_mesh(sizes):
    check_same_as_on_one_device(tiny.VIT, sizes)


def test_a_resnet_normalises_over_the_global_batch():
    # XLA's CPU devices can lock each other out in sums and gathers that are independent of each other: all are over the
    # same devices here, which are half of those that there are threads for.
    check_same_as_on_one_device(tiny.RESNET, (1, 4, 1))


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)], ids=str)
def test_blocks_in_pieces_of_each_share_learn_the_same(sizes):
    """Shares of 4 examples in pieces of 2 images and 2 captions."""
    tokens = 2 * max(tiny.VIT.vision.tokens, tiny.TEXT.context_length)
    check_same_as_on_one_device(tiny.VIT, sizes, Execution(block_tokens=tokens, remat="full"))


@pytest.mark.parametrize(("block_tokens", "dtype"), [(0, "bfloat16"), (1, "float32")])
def test_blocks_run_on_gathered_parameters(block_tokens, dtype, monkeypatch):
    """What goes into a block on every device: its whole matrices, 2 bytes per entry where no pieces are added up."""
    monkeypatch.setattr(transformer, "adds_bfloat16", lambda: True)  # as on accelerators; here it is only traced
    model = CLIP(tiny.VIT, Execution("bfloat16", remat="full", block_tokens=block_tokens))
    partitioner = over(1, 4, 2)
    variables = abstract_variables(model, partitioner)
    images, _ = abstract_inputs(tiny.VIT, BATCH)

    def loss(params, images):
        return model.apply({"params": params}, images, method=model.encode_image).astype(jnp.float32).sum()

    with partitioner.active():
        jaxpr = jax.make_jaxpr(jax.grad(loss))(variables["params"], images).jaxpr
    forward = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    body = getattr(forward.params["jaxpr"], "jaxpr", forward.params["jaxpr"])  # closed until jax 0.11
    shapes = [(out.aval.shape, inner.aval.shape) for out, inner in zip(forward.outvars, body.outvars, strict=True)]
    kept = [stacked for stacked, one in shapes if stacked != one]
    assert kept == [(2, BATCH, 17, 64)]  # each block's input, and no gathered parameter
    [share] = equations(body, "shard_map")
    kernels = [x.aval for x in share.invars if x.aval.shape == (1, 64, 256)]
    assert {x.dtype for x in kernels} == {jnp.dtype(dtype)}


def equations(jaxpr, primitive):
    """Those of a primitive, in whatever they are nested."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, primitive)


@pytest.mark.parametrize("block_tokens", [0, 1])
def test_a_batch_that_devices_cannot_share_is_encoded_all_the_same(block_tokens):
    model, tokens = CLIP(tiny.VIT, Execution(block_tokens=block_tokens)), tiny.tokens(tiny.VIT, 3)
    variables = nn.unbox(jax.jit(lambda key: model.lazy_init(key, *abstract_inputs(tiny.VIT)))(jax.random.key(0)))
    encode_text = functools.partial(model.apply, method=model.encode_text)
    got = over(2, 2, 1).jit(encode_text)(variables, tokens)
    np.testing.assert_allclose(got, jax.jit(encode_text)(variables, tokens), atol=1e-5)


def test_pieces_add_their_gradients_up_before_devices_do():
    """In the loop over pieces nothing travels: it is nested in the loop over layers, which alone has collectives."""
    execution = Execution(block_tokens=1, remat="full")
    training = training_of(tiny.VIT, over(2, 2, 1), execution=execution)
    state = initial_state(training, seed=0)
    batch = to_devices(tiny.batch(tiny.VIT, BATCH), training.partitioner)
    program = parse(make_train_step(training).lower(state, batch).compile().as_text())
    transformer = {depth: names for depth, names in collectives_by_depth(program).items() if depth}
    assert any("resblocks" in name or "transformer" in name for name in transformer[1])
    assert not transformer.get(2)


def test_devices_encode_their_shares_alone():
    """With whole parameters on each device nothing travels in the towers, the look-up at end-of-text included."""
    training = training_of(tiny.VIT, over(8, 1, 1))
    model, partitioner = training.model, training.partitioner
    state = initial_state(training, seed=0)
    batch = to_devices(tiny.batch(tiny.VIT, BATCH), partitioner)
    encoder = partitioner.jit(lambda variables, batch: encode(model, variables, *batch.values(), 1, partitioner))
    assert not collectives_by_depth(parse(encoder.lower(state.variables, batch).compile().as_text()))


def collectives_by_depth(program):
    """Depth in loops -> scopes of the collectives there."""
    found = {}

    def walk(computation, depth):
        for op in program.computations[computation]:
            if op.opcode == "while":
                walk(op.attribute("body"), depth + 1)
            elif op.opcode in ("call", "conditional"):
                for callee in op.callees:
                    walk(callee, depth)
            elif op.opcode.startswith(("all-", "reduce-scatter", "collective-")):
                found.setdefault(depth, []).append(op.scope)

    walk(program.entry, 0)
    return found


def check_same_as_on_one_device(config, sizes, execution=Execution()):  # noqa: B008
    losses, state = run(config, over(*sizes), execution)
    expected_losses, expected = on_one_device(config)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    for got, want in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(expected.batch_stats), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    # AdamW turns a gradient of rounding noise into a full step, so parameters agree to a share of the steps taken.
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        assert np.mean(np.abs(np.asarray(got) - want)) < 0.02 * 4 * OPTIMIZER.learning_rate


@functools.cache
def gradients(config, sizes, microbatches):
    training = training_of(config, over(*sizes))
    model, partitioner = training.model, training.partitioner
    state = initial_state(training, seed=0)
    batch = to_devices(tiny.batch(config, 16), partitioner)

    @jax.jit
    def loss_and_gradients(params):
        def loss(params):
            variables = {**state.variables, "params": params}
            images, texts, _ = encode(model, variables, batch["image"], batch["text"], microbatches, partitioner)
            return training.loss.over_mesh(images, texts, params, partitioner, tile=3)

        return jax.value_and_grad(loss)(params)

    return jax.tree.map(np.asarray, loss_and_gradients(state.params))


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_accumulation_is_exact_in_every_leaf(microbatches):
    loss, grads = gradients(tiny.VIT, (2, 1, 1), microbatches)
    expected_loss, expected = gradients(tiny.VIT, (2, 1, 1), 1)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(grads), strict=True):
        scale = np.abs(want).max()
        if [key.key for key in path[-2:]] == ["key", "bias"]:
            assert max(scale, np.abs(got).max()) < 1e-6  # softmax does not see a key bias: only rounding is left
            continue
        assert scale > 1e-5, path
        np.testing.assert_allclose(got, want, atol=1e-5 * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_batch_norm_of_micro_batches_uses_their_own_statistics_and_moves_once():
    """Each device's first half and second half are normalised apart; the running mean takes the mean of both."""
    training = training_of(tiny.RESNET, over(2, 1, 1))
    model, partitioner = training.model, training.partitioner
    state = initial_state(training, seed=0)
    batch = tiny.batch(tiny.RESNET, 8)

    @functools.partial(jax.jit, static_argnums=2)
    def features_and_statistics(image, text, microbatches):
        return encode(model, state.variables, image, text, microbatches, partitioner)

    images, _, statistics = features_and_statistics(batch["image"], batch["text"], 2)
    # Device 0 holds rows 0 to 3 and device 1 rows 4 to 7; a micro-batch is half of each.
    halves = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]
    parts = [features_and_statistics(batch["image"][rows], batch["text"][rows], 1) for rows in halves]
    for rows, (part, _, _) in zip(halves, parts, strict=True):
        np.testing.assert_allclose(np.asarray(images)[rows], part, atol=1e-5)
    means = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][2], parts[1][2])
    for got, want in zip(jax.tree.leaves(statistics), jax.tree.leaves(means), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [tiny.VIT, tiny.RESNET], ids=["vit", "resnet"])
def test_each_tower_kind_overfits_one_batch(config):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, warmup_steps=5), 200)
    training = training_of(config, over(1, 1, 1), optimizer)
    state, train_step = initial_state(training, seed=0), make_train_step(training)
    batch = to_devices(tiny.batch(config, BATCH), training.partitioner)
    losses = []
    for _ in range(60):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.9 * np.log(BATCH)
    assert losses[-1] < 0.05


@pytest.mark.parametrize(
    ("loss", "change", "bound"),
    [("softmax", 9.0, np.log(100)), ("softmax", -9.0, 0.0), ("sigmoid", 9.0, np.log(10) + 9)],
)
def test_the_temperature_stays_within_its_bounds(loss, change, bound):
    """An optimizer that moves every parameter by `change` cannot move CLIP's scale past its bound; SigLIP has none."""
    config = dataclasses.replace(tiny.VIT, logit_bias=loss == "sigmoid")
    optimizer = optax.stateless_with_tree_map(lambda gradient, _: jnp.full_like(gradient, change))
    training = training_of(config, over(1, 1, 1), optimizer, loss=LOSSES[loss])
    state, train_step = initial_state(training, seed=0), make_train_step(training)
    state, metrics = train_step(state, to_devices(tiny.batch(config, BATCH), training.partitioner))
    assert float(state.params["logit_scale"]) == float(metrics["logit_scale"]) == pytest.approx(bound, rel=1e-6)
    assert float(state.params["visual"]["ln_post"]["scale"][0]) == 1 + change


def test_bfloat16_follows_float32():
    losses, state = run(tiny.VIT, over(2, 1, 1), Execution(dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, on_one_device(tiny.VIT)[0], rtol=0.05)


def test_the_loss_must_suit_the_model():
    with pytest.raises(UserError, match="logit_bias"):
        make_train_step(training_of(tiny.VIT, over(1, 1, 1), loss=LOSSES["sigmoid"]))


def test_the_state_is_born_sharded():
    training = training_of(tiny.VIT, over(2, 2, 2))
    state, expected = initial_state(training, seed=0), abstract_state(training)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.sharding == want.sharding and got.dtype == want.dtype
    kernel = "visual", "transformer", "resblocks", "mlp", "c_fc", "kernel"
    moments = state.opt_state[0]
    for tree in (state.params, moments.mu, moments.nu):
        leaf = functools.reduce(lambda node, key: node[key], kernel, tree)
        assert leaf.addressable_shards[0].data.shape == (2, 64 // 2, 256 // 2)


def test_running_statistics_are_used_and_stay():
    model, partitioner = CLIP(tiny.RESNET), over(1, 1, 1)
    variables, batch = jax.tree.map(jnp.asarray, tiny.variables(tiny.RESNET)), tiny.batch(tiny.RESNET, 6)

    @jax.jit
    def encoded(images, texts):
        return encode(model, variables, images, texts, 3, partitioner, train=False)

    def alone(images):
        images = Preprocess.from_config(tiny.RESNET).normalize(images, jnp.float32)
        return normalize(model.apply(variables, images, method=model.encode_image))

    features, _, statistics = encoded(batch["image"], batch["text"])
    assert not statistics
    np.testing.assert_allclose(features, jax.jit(alone)(batch["image"]), atol=1e-5)


def test_a_frozen_tower_has_no_statistics_of_its_batch():
    config = RunConfig("x", tiny.RESNET, optimizer=dataclasses.replace(OPTIMIZER, frozen=("visual/*",)))
    assert make_training(config).running_statistics
    assert not make_training(dataclasses.replace(config, optimizer=OPTIMIZER)).running_statistics


def test_a_mesh_or_a_batch_that_does_not_fit_eight_devices_is_told_what_would():
    with pytest.raises(UserError, match=r"does not fit 8 devices; .*each one of 1, 2, 4, 8"):
        make_partitioner(MeshConfig(data=3))
    with pytest.raises(UserError, match=r"multiple of 8 .* try 8 or 16"):
        make_partitioner(MeshConfig()).check_batch_size(12)
