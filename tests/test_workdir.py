"""The best step of a workdir, from metrics that a killed run may have left half-written."""

import json

import pytest

from clip_jax.workdir import METRICS, best_step, read_metrics

LINES = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "eval/a/acc1": 0.5, "eval/b/acc1": 0.7},
    {"step": 4, "eval/a/acc1": 0.9, "eval/b/acc1": 0.3, "eval/b/acc5": 1.0},
    {"step": 6, "eval/a/acc1": 0.9, "eval/b/acc1": 0.9},
]


def write(workdir, last=""):
    (workdir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in LINES) + last)


def test_the_best_step_has_the_highest_mean_accuracy_of_those_that_are_kept(tmp_path):
    assert best_step(tmp_path, [2, 4]) is None
    write(tmp_path)
    assert best_step(tmp_path, [1, 2, 4, 6]) == 6
    assert best_step(tmp_path, [1, 2, 4]) == 4  # both have a mean of 0.6: the later one
    assert best_step(tmp_path, [1, 3]) is None


def test_a_half_written_last_line_is_left_out(tmp_path):
    write(tmp_path, last='{"step": 7, "eval/a/ac')
    assert read_metrics(tmp_path) == LINES
    assert best_step(tmp_path, [6]) == 6


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1.0}', '{"step": "7"}', "\udcff", "[" * 100_000])
def test_a_damaged_line_is_said_and_left_out(tmp_path, line, caplog):
    write(tmp_path)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b'\n{"step": 7}\n')
    assert read_metrics(tmp_path) == [*LINES, {"step": 7}]
    assert "metrics.jsonl: left out 1 damaged lines" in caplog.text


def test_another_line_of_a_step_and_other_evaluation_sets_do_not_mislead(tmp_path):
    (tmp_path / METRICS).write_text(
        '{"step": 1, "eval/easy/acc1": 1.0}\n'
        '{"step": 2, "eval/a/acc1": 0.5}\n{"step": 2, "eval/a/recall": 0.9}\n'
        '{"step": 3, "eval/a/acc1": 0.4}\n'
    )
    assert best_step(tmp_path, [1, 2, 3]) == 2


def test_the_average_of_the_weights_is_judged_by_its_own_accuracy(tmp_path):
    (tmp_path / METRICS).write_text(
        '{"step": 1, "eval/a/acc1": 0.5, "eval_ema/a/acc1": 0.9}\n'
        '{"step": 2, "eval/a/acc1": 0.6, "eval_ema/a/acc1": 0.8}\n'
    )
    assert best_step(tmp_path, [1, 2]) == 2 and best_step(tmp_path, [1, 2], averaged=True) == 1
