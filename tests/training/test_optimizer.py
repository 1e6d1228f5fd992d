import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.models import CLIP
from clip_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, weight_decay_mask
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
