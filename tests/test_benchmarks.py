"""What the benchmarks' tables say of the machine they come from, and what the story of adaptation rests on."""

from pathlib import Path

import numpy as np
import optax
import pytest
import torch

from benchmarks import adaptation_data
from benchmarks.adaptation import tutorials_adam
from benchmarks.adaptation_table import table
from benchmarks.machine import cpu
from clip_jax.training.optimizer import OptimizerConfig

CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""


@pytest.mark.skipif("model name" not in CPUINFO, reason="only x86 Linux names its CPU there")
def test_a_table_names_its_cpu_and_its_extensions():
    fields = {line.partition("\t")[0]: line.partition(": ")[2] for line in CPUINFO.splitlines()}
    assert fields["model name"].strip() in cpu()
    for extension in ("avx512f", "amx_tile"):
        assert (extension in cpu()) == (extension in fields["flags"].split())


def test_no_image_of_a_new_digit_is_learned_from_and_judged_by():
    dataset = adaptation_data.new_digits(seed=1)
    learned, judged = (
        {image_bytes(example) for example in part.examples} for part in (dataset.train(), dataset.source)
    )
    assert not learned & judged
    old = {image_bytes(example) for example in adaptation_data.old_digits().examples}
    everything = {image_bytes(example) for example in adaptation_data.all_digits(seed=1).source.examples}
    assert not old & everything and judged < everything
    labels = [example.label for example in dataset.train().examples]
    assert {label: labels.count(label) for label in labels} == dict.fromkeys(range(5), adaptation_data.SHOTS)


def image_bytes(example):
    return example.image.tobytes()


def test_accuracy_on_new_and_old_digits():
    scores = np.zeros((4, 10), np.float32)
    scores[[0, 1, 2, 3], [7, 8, 2, 6]] = 1  # of these the second is wrong, and the fourth among all ten
    scores[3, 3] = 0.5
    assert adaptation_data.accuracies(scores, np.array([7, 9, 2, 3])) == {
        "new": 0.5,
        "old": 1.0,
        "all ten": 0.5,
    }


def test_the_optimizer_of_the_tutorials_is_theirs():
    generator = np.random.default_rng(0)
    start, *grads = generator.normal(size=(6, 3, 4)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    optimizer = tutorials_adam(OptimizerConfig(learning_rate=1e-2), total_steps=5)
    ours, state = {"kernel": start}, optimizer.init({"kernel": start})
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        adam.step()
        updates, state = optimizer.update({"kernel": grad}, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), rtol=1e-5)


def test_the_table_has_a_line_for_each_variant_with_mean_and_range():
    columns = ("new", "old", "shapes", "all ten")
    seeds = [
        {"seconds": 20.0, "": dict.fromkeys(columns, 0.5), "EMA": dict.fromkeys(columns, end)} for end in (0.2, 0.4)
    ]
    probe = [{"": {"new": 0.9, "old": 0.6, "shapes": 0.3}}]
    assert table({"full": seeds, "linear probe": probe, "not there": []})[2:] == [
        "| full |" + " 50.0 (50.0-50.0) |" * 5 + " 20 |",
        "| · EMA |" + " 30.0 (20.0-40.0) |" * 5 + "  |",
        "| linear probe | 90.0 | 60.0 | 30.0 |  | 60.0 |  |",
    ]
