"""Bad steps change nothing but the counts, on every device; spikes follow the rule as NumPy has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.training.guard import GuardConfig, accepts, advance, initial_guard
from clip_jax.training.loop import to_devices
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import initial_state
from clip_jax.training.step import make_train_step
from tests import tiny
from tests.training.dark import black_images_are_nan
from tests.training.test_step import BATCH, TILED, over, training_of


def steps(training, train_step, batches):
    """(states before the first and after each step, metrics of each), on the host."""
    state = initial_state(training, seed=0)
    states, metrics = [jax.tree.map(np.asarray, state)], []
    for batch in batches:
        state, values = train_step(state, to_devices(batch, training.partitioner))
        states.append(jax.tree.map(np.asarray, state))
        metrics.append(jax.tree.map(np.asarray, values))
    return states, metrics


def same(one, other):
    """Whether two states hold the same parameters, statistics and optimizer's state, to the bit."""
    pairs = zip(jax.tree.leaves(learned(one)), jax.tree.leaves(learned(other)), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def learned(state):
    return state.params, state.batch_stats, state.opt_state


def counts(state):
    return int(state.step), int(state.guard.skipped), int(state.guard.skipped_in_a_row)


def test_bad_steps_change_nothing_on_any_device(monkeypatch):
    """One image of the last device makes NaN; at a low learning rate losses go up and down, so that some are spikes."""
    black_images_are_nan(monkeypatch)
    config = GuardConfig(spike_sigma=0.5, spike_window=3)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6, warmup_steps=2), 100)
    training = training_of(tiny.VIT, over(2, 2, 2), optimizer, guard=config)
    train_step = make_train_step(training)
    good = [tiny.batch(tiny.VIT, BATCH, seed) for seed in range(12)]
    bad = {**good[0], "image": good[0]["image"].copy()}
    bad["image"][-1] = 0
    batches = [*good[:1], bad, bad, *good[1:10], bad, *good[10:]]
    states, metrics = steps(training, train_step, batches)

    observed = [(values["loss"], values["grad_norm"]) for values in metrics]
    accepted = by_numpy(observed, config)
    assert sum(accepted) < len(good)
    skipped, in_a_row = 0, 0
    for number, (before, after, taken) in enumerate(zip(states, states[1:], accepted, strict=False), 1):
        skipped, in_a_row = skipped + (not taken), 0 if taken else in_a_row + 1
        assert counts(after) == (number, skipped, in_a_row)
        assert taken or same(before, after)
    kept = [pair for pair, taken in zip(observed, accepted, strict=True) if taken]
    np.testing.assert_array_equal(states[-1].guard.recent, np.transpose(kept[-3:]))

    undisturbed, _ = steps(training, train_step, good)
    assert same(states[-1], undisturbed[-1]) and not same(states[-1], states[0])


def test_statistics_of_a_bad_step_are_not_kept():
    training = training_of(tiny.RESNET, over(1, 1, 1), loss=TILED)
    batch, train_step = to_devices(tiny.batch(tiny.RESNET, BATCH), training.partitioner), make_train_step(training)
    state, _ = train_step(initial_state(training, seed=0), batch)
    bad = state.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
    before = jax.tree.map(np.array, bad)
    state, _ = train_step(bad, batch)
    assert same(state, before)
    assert counts(state) == (2, 1, 1) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.batch_stats))


def by_numpy(observed, config):
    """Whether each step is accepted, from its (loss, gradient norm) and those of the accepted ones before it."""
    kept, accepted = [], []
    for pair in observed:
        window = np.array(kept[-config.spike_window :])
        full = len(window) == config.spike_window
        spike = full and bool(np.any(pair > window.mean(axis=0) + config.spike_sigma * window.std(axis=0)))
        accepted.append(bool(np.isfinite(pair).all()) and not spike)
        kept += [pair] if accepted[-1] else []
    return accepted


def test_the_rule_is_numpys():
    config = GuardConfig(spike_sigma=2.0, spike_window=8)
    generator = np.random.default_rng(0)
    observed = generator.normal(5, 1, (200, 2)).astype(np.float32)
    observed[generator.random((200, 2)) < 0.05] *= 3
    observed[generator.random((200, 2)) < 0.03] = np.nan
    observed[generator.random((200, 2)) < 0.03] = np.inf
    variables = {"kernel": jnp.ones(3)}

    @functools.partial(jax.jit)
    def judge(guard, loss, grad_norm):
        accepted = accepts(guard, config, loss, grad_norm, variables)
        return accepted, advance(guard, accepted, loss, grad_norm)

    guard, accepted = initial_guard(config), []
    for loss, grad_norm in observed:
        good, guard = judge(guard, jnp.float32(loss), jnp.float32(grad_norm))
        accepted.append(bool(good))
    assert accepted == by_numpy(list(observed), config)
    assert int(guard.skipped) == accepted.count(False) > 20


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_a_step_leads_to_must_be_finite(bad):
    good = {"params": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, "batch_stats": {"mean": jnp.ones(2)}}
    config, one = GuardConfig(), jnp.float32(1)
    guard = initial_guard(config)
    assert accepts(guard, config, one, one, good)
    for number in range(3):
        leaves, shape = jax.tree.flatten(good)
        leaves[number] = leaves[number].at[1].set(bad)
        assert not accepts(guard, config, one, one, jax.tree.unflatten(shape, leaves))


def test_spikes_cost_nothing_unless_they_are_asked_for():
    assert initial_guard(GuardConfig()).recent is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_skipped": 0}, "guard.max_skipped must be at least 1"),
        ({"spike_sigma": -1.0}, "guard.spike_sigma must be at least 0"),
        ({"spike_sigma": float("nan")}, "guard.spike_sigma must be at least 0"),
        ({"spike_window": 1}, "guard.spike_window must be at least 2"),
    ],
)
def test_impossible_rules_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        GuardConfig(**changes)
