"""A run that starts from a model, trains a part of it, and goes on where it was killed."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from clip_jax import model_folder
from clip_jax.judged_run import Evaluation
from clip_jax.training.config import make_training
from clip_jax.training.initial_weights import InitialWeights
from clip_jax.training.optimizer import OptimizerConfig
from clip_jax.training.run import run
from clip_jax.weights import load_variables
from clip_jax.workdir import read_metrics
from tests import tiny
from tests.training.test_run import CONFIG

pytestmark = pytest.mark.usefixtures("one_device")

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3,
    warmup_steps=1,
    frozen=("visual/*", "logit_scale"),
    learning_rates={"text/ln_final/*": 0.5},
    layer_decay=0.7,
    clip_norm=1.0,
    clip_updates=True,
    mu_dtype="bfloat16",
)


def test_frozen_parts_stay_bit_for_bit_and_a_resumed_run_does_not_start_again(tmp_path):
    source, workdir = tmp_path / "source", tmp_path / "run"
    small = tiny.variables(CONFIG.model)
    small["params"]["logit_scale"] = np.float32(4.7)  # above the loss's bound, as weights from elsewhere may be
    model_folder.write(source, CONFIG.model, small)
    model = dataclasses.replace(CONFIG.model, text=dataclasses.replace(CONFIG.model.text, context_length=12))
    config = dataclasses.replace(
        CONFIG,
        model=model,
        init=InitialWeights(str(source)),
        optimizer=OPTIMIZER,
        repeated_captions="positives",
        ema_decay=0.9,
        total_steps=4,
        checkpoint_every=2,
    )
    state = run(config, str(workdir), Evaluation)
    evaluate = Evaluation(config, make_training(config))
    averaged = evaluate(state.replace(params=state.ema_variables["params"]))
    _, logged = (line for line in read_metrics(workdir) if "eval/digits/acc1" in line)
    for metric in ("acc1", "mean_per_class_recall"):
        assert logged[f"eval_ema/digits/{metric}"] == averaged[f"eval/digits/{metric}"]
    before, after = (flatten_dict(tree, sep="/") for tree in (small["params"], load_variables(workdir)[1]["params"]))
    for path, leaf in after.items():
        fixed = path.startswith("visual/") or path == "logit_scale"
        assert np.array_equal(leaf, before[path][: leaf.shape[0]] if leaf.ndim else before[path]) == fixed, path
    moments = {path for leaf, path in _paths((state.opt_state, state.ema)) if leaf.ndim}
    assert moments and not any("visual" in path for path in moments)
    assert not np.array_equal(state.ema["text"]["text_projection"], state.params["text"]["text_projection"])
    shutil.rmtree(workdir / "checkpoints" / "4")
    shutil.rmtree(source)
    again = run(config, str(workdir))
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def _paths(tree):
    return [(leaf, jax.tree_util.keystr(path)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
