"""How every parameter of two models is split over a mesh of fsdp=4 and tensor=2, against files in golden/.

A change of these is a change of every run's memory and traffic. Where it is meant, write the files anew and look at
the difference: python -m tests.training.test_golden_shardings
"""

import json
from pathlib import Path

import jax
import pytest

from clip_jax.models import CLIP, OPENAI_MODELS
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import Training, TrainState, abstract_state

GOLDEN = {"ViT-B/32": "vit_b32.json", "RN50": "rn50.json"}
FOLDER = Path(__file__).parent / "golden"


def state_of(name: str) -> TrainState:
    partitioner = make_partitioner(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=1), total_steps=2)
    return abstract_state(Training(CLIP(OPENAI_MODELS[name]), optimizer, partitioner))


def described(tree) -> dict[str, str]:
    """Path of a leaf -> its shape and the mesh axes that split it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.shape} {tuple(leaf.sharding.spec)}"
        for path, leaf in leaves
    }


@pytest.fixture(scope="module", params=GOLDEN)
def model(request):
    return request.param, state_of(request.param)


def test_parameters_are_split_as_the_file_says(model):
    name, state = model
    assert described(state.params) == json.loads((FOLDER / GOLDEN[name]).read_text())


def test_moments_are_split_like_their_parameters(model):
    _, state = model
    adam = state.opt_state[0]
    assert described(adam.mu) == described(adam.nu) == described(state.params)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for name, file in GOLDEN.items():
        (FOLDER / file).write_text(json.dumps(described(state_of(name).params), indent=1) + "\n")
