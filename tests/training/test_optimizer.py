import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from clip_jax.errors import UserError
from clip_jax.models import CLIP, variable_shapes
from clip_jax.parallel import MeshConfig
from clip_jax.training.config import RunConfig, make_training
from clip_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, weight_decay_mask
from clip_jax.training.parameters import layer_factors, split
from clip_jax.training.state import abstract_state
from tests import tiny


def test_schedule_warms_up_linearly_and_decays_like_a_cosine():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4), 20)
    steps = np.arange(20)
    expected = np.where(steps < 4, (steps + 1) / 4, 0.5 * (1 + np.cos(np.pi * (steps + 1 - 4) / 16))) * 2.0
    np.testing.assert_allclose([float(schedule(step)) for step in steps], expected, atol=1e-6)


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps"):
        learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=20), 20)


def test_one_update_is_decoupled_adamw():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3, warmup_steps=0)
    params = {"kernel": jnp.float32(2.0), "bias": jnp.float32(2.0)}
    grads = {"kernel": jnp.float32(0.5), "bias": jnp.float32(0.5)}
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    rate = 0.05 * (1 + np.cos(np.pi / 10))  # of the first step
    adam = 0.5 / (0.5 + 1e-3)
    assert float(updates["kernel"]) == pytest.approx(-rate * (adam + 0.3 * 2.0), rel=1e-5)
    assert float(updates["bias"]) == pytest.approx(-rate * adam, rel=1e-5)


@pytest.mark.parametrize("config", [tiny.VIT, tiny.RESNET], ids=["vit", "resnet"])
def test_all_weights_decay_but_gains_and_biases(config):
    images, tokens = np.zeros((1, 32, 32, 3), np.float32), tiny.tokens(config, 1)
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0), images, tokens)["params"]
    mask = jax.tree_util.tree_leaves_with_path(weight_decay_mask(params))
    decays = {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in mask}
    kept = {name for name, value in decays.items() if not value}
    assert kept == {name for name in decays if name.split("/")[-1] in ("scale", "bias", "logit_scale")}
    assert decays["text/token_embedding"] and decays["text/text_projection"]
    if "visual/class_embedding" in decays:
        assert decays["visual/class_embedding"] and decays["visual/proj"]


def steps_of(optimizer, params, gradients):
    """(parameters, state) after some updates."""
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def stable_adamw(param, gradients, config, rates, decay):
    """StableAdamW (arXiv 2304.13013, algorithm 2) of one tensor, with its de-biased betas."""
    first, second = np.zeros_like(param), np.zeros_like(param)
    for step, (grad, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        b1 = config.b1 * (1 - config.b1 ** (step - 1)) / (1 - config.b1**step)
        b2 = config.b2 * (1 - config.b2 ** (step - 1)) / (1 - config.b2**step)
        first = b1 * first + (1 - b1) * grad
        second = b2 * second + (1 - b2) * grad**2
        rms = np.sqrt(np.mean(grad**2 / np.maximum(second, config.eps**2)))
        rate = rate / max(1.0, rms)
        param = param - rate * decay * param - rate * first / (np.sqrt(second) + config.eps)
    return param


def test_clipped_updates_are_stable_adamw():
    """Gradients grow a hundredfold in between; each block of a stack is clipped by itself."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, warmup_steps=0, clip_updates=True)
    generator = np.random.default_rng(0)
    shapes = {"proj": (3, 4), "transformer": {"resblocks": {"kernel": (2, 5)}}}
    draw = lambda factor: jax.tree.map(  # noqa: E731
        lambda shape: factor * generator.normal(size=shape), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    params, gradients = draw(1), [draw(100 if step == 6 else 1) for step in range(10)]
    for step in range(10):
        gradients[step]["transformer"]["resblocks"]["kernel"][1] *= 10 if step == 3 else 1
    schedule = learning_rate_schedule(config, 10)
    with jax.enable_x64(True):
        got, _ = steps_of(make_optimizer(config, 10), params, gradients)
        rates = [float(schedule(step)) for step in range(10)]
    expected = stable_adamw(params["proj"], [grads["proj"] for grads in gradients], config, rates, 0.3)
    np.testing.assert_allclose(got["proj"], expected, rtol=1e-12)
    kernel = lambda tree: tree["transformer"]["resblocks"]["kernel"]  # noqa: E731
    for block in range(2):
        expected = stable_adamw(kernel(params)[block], [kernel(g)[block] for g in gradients], config, rates, 0.3)
        np.testing.assert_allclose(kernel(got)[block], expected, rtol=1e-12)


def test_the_first_moment_in_bfloat16_is_the_only_one():
    config = OptimizerConfig(warmup_steps=0, mu_dtype="bfloat16", clip_updates=True, clip_norm=1.0)
    state = make_optimizer(config, 10).init({"kernel": jnp.ones((2, 2))})
    assert state[1][0].mu["kernel"].dtype == jnp.bfloat16 and state[1][0].nu["kernel"].dtype == jnp.float32


def layers_of(config, decay):
    params = variable_shapes(config)["params"]
    factors = layer_factors(params, decay)
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    return flatten_dict(factors, sep="/"), flatten_dict(shapes, sep="/")


def test_layers_of_a_vit_are_counted_from_the_top():
    factors, shapes = layers_of(tiny.VIT, 0.5)  # two blocks in each tower
    assert factors["visual/proj"] == factors["text/ln_final/bias"] == factors["logit_scale"] == 1
    for path in ("visual/conv1/kernel", "visual/class_embedding", "visual/ln_pre/scale", "text/token_embedding"):
        assert factors[path] == 0.5**3
    for path, factor in factors.items():
        if "resblocks" in path:
            np.testing.assert_array_equal(np.ravel(factor), [0.5**2, 0.5])
            assert factor.ndim == len(shapes[path])


def test_layers_of_a_resnet_are_its_stages():
    factors, _ = layers_of(tiny.RESNET, 0.5)
    assert factors["visual/attnpool/positional_embedding"] == 1 and factors["visual/layer4_0/conv1/kernel"] == 0.5
    assert factors["visual/layer2_1/bn3/scale"] == 0.5**3 and factors["visual/bn2/bias"] == 0.5**5


def test_blocks_that_are_frozen_cannot_be_counted():
    params, _ = split(variable_shapes(tiny.VIT)["params"], ("text/transformer/*",))
    with pytest.raises(
        UserError, match=r"blocks of a tower, but those of text are frozen and positional_embedding is not"
    ):
        layer_factors(params, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rates": {"vision/*": 0.1}}, "learning_rates: the pattern 'vision/.' matches no parameter that"),
        (
            {"frozen": ("visual/*",), "learning_rates": {"visual/proj": 2.0}},
            "learning_rates: the pattern 'visual/proj'",
        ),
        ({"weight_decays": {"*/ln_pre/*": 2.0}}, "weight_decays: the pattern './ln_pre/.' matches no"),
        ({"frozen": ("visual/*", "img/*")}, "optimizer.frozen: the pattern 'img/.' matches no parameter of the model"),
        ({"frozen": ("*",)}, "leaves nothing to train"),
    ],
    ids=["misspelt", "rate of a frozen part", "decay of gains", "frozen misspelt", "all frozen"],
)
def test_patterns_that_match_nothing_are_refused(fields, message):
    config = RunConfig("x", tiny.VIT, optimizer=OptimizerConfig(warmup_steps=1, **fields), mesh=MeshConfig(1, 1, 8))
    with pytest.raises(UserError, match=message):
        abstract_state(make_training(config))


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rates": {"visual/*": 0.0}},
        {"weight_decays": {"visual/*": -1.0}},
        {"layer_decay": 1.5},
        {"clip_norm": -1.0},
    ],
)
def test_impossible_values_are_refused(fields):
    with pytest.raises(UserError, match=f"optimizer.{next(iter(fields))} "):
        OptimizerConfig(**fields)
