"""The order of the rooms, and what each part of the project needs to be installed."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clip_jax import model_folder
from tests import tiny

ROOT = Path(__file__).parent.parent


def lint_imports(folder):
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_no_import_runs_against_the_order_of_the_rooms():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("room", "line"),
    [("models/clip.py", "import clip_jax.training.step"), ("evaluation/metrics.py", "import clip_jax.training.state")],
)
def test_an_import_that_is_turned_round_is_noticed(tmp_path, room, line):
    shutil.copytree(ROOT / "clip_jax", tmp_path / "clip_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "clip_jax" / room).open("a") as file:
        file.write(f"{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1 and "BROKEN" in result.stdout


def test_the_requirements_of_the_library_and_of_the_scripts_are_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    parts = [
        *project["dependencies"],
        *(need for name in extras if name not in ("tpu", "cuda", "beam") for need in extras[name]),
    ]
    lines = [re.sub(r"\s*#.*", "", line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert set(parts) == {line for line in lines if line}


CORE = """
import sys

for name in (
    "array_record", "jinja2", "matplotlib", "ml_collections", "sklearn", "tensorboardX", "tensorflow",
    "tensorflow_datasets", "tensorflow_text", "torch", "transformers",
):
    sys.modules[name] = None

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import clip_jax
from clip_jax.losses import CONTRASTIVE

model, variables, preprocess = clip_jax.load(sys.argv[1])
images = preprocess(Image.new("RGB", (40, 50)))[None]
tokens = clip_jax.tokenize(["a diagram", "a dog"], context_length=16) % 512
logits, _ = jax.jit(model.apply)(variables, images, tokens)
assert logits.shape == (1, 2) and bool(jnp.isfinite(logits).all())
for loss in CONTRASTIVE.values():
    features = jnp.eye(2)
    assert np.isfinite(loss.dense(features, features, *map(jnp.float32, loss.initial.values())))
"""


def test_the_core_works_without_what_training_data_and_evaluation_need(tmp_path):
    model_folder.write(tmp_path / "model", tiny.VIT, tiny.variables(tiny.VIT))
    command = [sys.executable, "-c", CORE, str(tmp_path / "model")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
