"""A run that gets no better ends early, at the same step whatever happened to it, and stays ended."""

import json
import shutil

import pytest

from clip_jax.training.patience import gets_no_better
from clip_jax.training.run import run
from clip_jax.workdir import scores
from tests.training.test_run import config_of

pytestmark = pytest.mark.usefixtures("one_device")


def write_metrics(workdir, lines):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("values", "patience", "over"),
    [
        ([], 1, False),
        ([0.5, 0.4], 0, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),  # no better is not better
        ([0.5, 0.4, 0.6], 1, False),
        ([0.6, 0.4, 0.5], 2, True),  # better than the one before, but not than the best
        ([0.6, 0.4, 0.7], 2, False),
        ([0.6, 0.4], 2, False),
    ],
)
def test_it_is_over_after_so_many_evaluations_that_are_no_better_than_the_best(tmp_path, values, patience, over):
    write_metrics(tmp_path, [{"step": step, "eval/a/acc1": value} for step, value in enumerate(values)])
    assert gets_no_better(tmp_path, patience) == over


def test_the_score_is_the_mean_accuracy_of_the_same_sets_or_recall(tmp_path):
    recall = {"eval/c/image_retrieval_recall@1": 0.9}
    lines = [{"step": 1, "eval/a/acc1": 1.0}, {"step": 2, "eval/a/acc1": 0.2, "eval/b/acc1": 0.4, **recall}]
    write_metrics(tmp_path, lines)
    assert scores(tmp_path) == {2: pytest.approx(0.3)}
    assert scores(tmp_path, [1]) == {1: 1.0}
    write_metrics(tmp_path, [{"step": 3, "loss": 1.0, **recall}, {"step": 4, "loss": 2.0}])
    assert scores(tmp_path) == {3: 0.9}


def test_a_run_ends_early_saved_and_stays_ended_even_if_it_was_killed(tmp_path, caplog):
    accuracies = {1: 0.5, 2: 0.9, 3: 0.8, 4: 0.9, 5: 1.0}
    asked = []

    def make_evaluate(config, training):
        def evaluate(state):
            asked.append(int(state.step))
            return {"eval/digits/acc1": accuracies[int(state.step)]}

        return evaluate

    def go_on(**changes):
        return int(
            run(config_of(eval_every=1, checkpoint_every=3, patience=2, **changes), str(tmp_path), make_evaluate).step
        )

    assert go_on() == 4 and asked == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
    with caplog.at_level("INFO", "clip_jax"):
        assert go_on(total_steps=8) == 4 and len(asked) == 4
    assert "the run was ended early, at step 4; a higher patience lets it go on" in caplog.text
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert go_on(total_steps=8) == 4 and asked[4:] == [4]
