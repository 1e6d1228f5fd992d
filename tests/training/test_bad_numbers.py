"""Whole runs whose numbers go bad: they go on, or stop with a finite checkpoint and a report."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest

from clip_jax.errors import RunStopped
from clip_jax.training.guard import GuardConfig
from clip_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from clip_jax.training.run import run
from clip_jax.weights import load_variables
from clip_jax.workdir import METRICS
from tests.training.dark import black_images_are_nan, dark_data
from tests.training.test_run import CONFIG, config_of

pytestmark = pytest.mark.usefixtures("one_device")

SIZE = CONFIG.batch_size * CONFIG.total_steps  # each picture is seen once


def position(step, row):
    """In the global order, of a row of the batch of a step (from 1)."""
    return (step - 1) * CONFIG.batch_size + row


def strict_lines(workdir):
    def refuse(text):
        raise ValueError(text)

    return [json.loads(line, parse_constant=refuse) for line in (workdir / METRICS).read_text().splitlines()]


def test_a_run_goes_on_after_a_bad_batch(tmp_path, monkeypatch, caplog):
    black_images_are_nan(monkeypatch)
    guard = GuardConfig(spike_sigma=100.0, spike_window=2)
    config = config_of(data=dark_data(0, SIZE, [position(3, 5)]), log_every=1, checkpoint_every=3, guard=guard)
    with caplog.at_level(logging.WARNING, "clip_jax"):
        state = run(config, str(tmp_path))
    assert int(state.step) == 6 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [record.getMessage() for record in caplog.records] == [
        "step 3 is skipped, 1 in a row: loss nan, gradient norm nan"
    ]
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert [line["skipped_in_a_row"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert ["loss" in line and "grad_norm" in line for line in lines] == [True, True, False, True, True, True]
    # The optimizer's schedule counts updates, and the log says what was applied last.
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    assert int(state.opt_state[2].count) == 5
    assert [line["learning_rate"] for line in lines] == [float(schedule(update)) for update in (0, 1, 1, 2, 3, 4)]
    # The checkpoint that was due at the skipped step waits for the next accepted one.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    check_resumes(tmp_path, config, state)


def check_resumes(workdir, config, state):
    """Counts and window are restored with the rest; a checkpoint of before there were any begins them anew."""
    shutil.rmtree(workdir / "checkpoints" / "6")
    resumed = run(config, str(workdir))
    for got, want in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)
    shutil.rmtree(workdir / "checkpoints" / "6")
    for name in ("guard", "run"):
        shutil.rmtree(workdir / "checkpoints" / "4" / name)
    (workdir / "checkpoints" / "4" / "files.json").unlink()
    resumed = run(config, str(workdir))
    for got, want in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(resumed.guard.skipped) == 0


def test_lasting_bad_numbers_stop_the_run_and_cost_no_checkpoint(tmp_path, monkeypatch):
    black_images_are_nan(monkeypatch)
    config = config_of(
        data=dark_data(0, SIZE, [position(step, 5) for step in (4, 5, 6)]),
        checkpoint_every=1,
        log_every=1,
        guard=GuardConfig(max_skipped=3),
    )
    with pytest.raises(RunStopped, match=r"steps 4 to 6 were skipped .* loss nan, gradient norm nan") as stopped:
        run(config, str(tmp_path))
    assert stopped.value.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_variables(tmp_path)[1]))
    report = [json.loads(line) for line in (tmp_path / "skipped_step_4.jsonl").read_text().splitlines()]
    assert str(tmp_path / "skipped_step_4.jsonl") in str(stopped.value)
    assert [sample["position"] for sample in report] == list(range(48, 64))
    [index] = dark_data(0, SIZE, [position(4, 5)])["dark"]["black"]
    assert report[5] == {"position": 53, "source": "dark", "index": index, "key": f"{index}.png",
                         "caption": f"number {index}"}  # fmt: skip
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_absurd_learning_rate_ends_with_a_finite_checkpoint(tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=1)
    with pytest.raises(RunStopped) as stopped:
        run(config_of(optimizer=optimizer, guard=GuardConfig(max_skipped=2)), str(tmp_path))
    assert stopped.value.exit_code == 1
    _, variables = load_variables(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    strict_lines(tmp_path)
