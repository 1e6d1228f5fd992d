"""A loss, a data source, an evaluation set and a hook of one's own: each touches one place, shown by one run of all."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.data.sources import SOURCES, SourceConfig
from clip_jax.evaluation.registry import EVALUATION_SETS, Entry
from clip_jax.judged_run import Evaluation
from clip_jax.losses import LOSSES, SOFTMAX
from clip_jax.options import option
from clip_jax.training import run as run_module
from clip_jax.training.config import RunConfig
from clip_jax.training.loop import Hook, every
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.workdir import read_metrics
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")

# A loss is one object: twice CLIP's, with another start.
DOUBLED = replace(
    SOFTMAX,
    dense=lambda *arguments: 2 * SOFTMAX.dense(*arguments),
    part=lambda *arguments: 2 * SOFTMAX.part(*arguments),
    initial={"logit_scale": 1.0},
)


@dataclass(frozen=True, kw_only=True)
class GreysConfig(SourceConfig):
    """A data source is one class of fields, and what they open."""

    shades: int = option(4, "how many images")

    def open(self, access):
        return Greys(self.shades)


class Greys:
    name, class_names = "greys", ("a dark grey", "a light grey")

    def __init__(self, shades):
        self.shades = shades

    def __len__(self):
        return self.shades

    def __getitem__(self, index):
        label = int(2 * index >= self.shades)
        pixels = np.full((40, 40, 3), 255 * index // self.shades, np.uint8)
        return Example(Image.fromarray(pixels), (self.class_names[label],), label)


class Seen(Hook):
    """A hook is a class with the methods it needs."""

    def __init__(self):
        self.calls = []

    def start(self, state):
        self.calls.append("start")

    def step(self, step):
        self.calls.append(step.number)

    def end(self):
        self.calls.append("end")


def test_a_run_with_a_loss_a_source_an_evaluation_set_and_a_hook_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "doubled", DOUBLED)
    monkeypatch.setitem(SOURCES, "greys", GreysConfig)
    monkeypatch.setitem(EVALUATION_SETS, "greys", Entry({"kind": "greys", "shades": 6}, ("{}",)))
    seen, hooks = Seen(), run_module._hooks
    monkeypatch.setattr(run_module, "_hooks", lambda *arguments: [*hooks(*arguments), every(2, seen)])
    config = RunConfig(
        name="own",
        model=replace(tiny.VIT, text=replace(tiny.TEXT, vocab_size=49408)),
        data={"greys": {"shades": 8}},
        eval_datasets=("greys",),
        loss="doubled",
        batch_size=8,
        total_steps=3,
        optimizer=OptimizerConfig(warmup_steps=1),
    )
    run_module.run(config, str(tmp_path), Evaluation)
    assert seen.calls == ["start", 2, 3, "end"]
    first, *_, evaluated = read_metrics(tmp_path)
    # The loss of 8 pairs is near ln 8 at first; this one is twice that, and its scale starts elsewhere.
    assert abs(first["loss"] - 2 * np.log(8)) < 2.0 and abs(first["logit_scale"] - 1) < 0.01
    assert set(evaluated) == {"step", "eval/greys/acc1", "eval/greys/mean_per_class_recall"}
