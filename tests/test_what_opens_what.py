"""Every kind of source, opened by everything that takes a model: the table "What opens what" of docs/weights.md."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import clip_jax
import convert_torch_weights
import evaluate
from clip_jax import model_folder
from clip_jax.models import CLIPConfig, TextConfig, VisionTransformerConfig
from clip_jax.weights import download, hub, save
from clip_jax.workdir import METRICS
from tests import tiny

CONFIG = CLIPConfig(32, VisionTransformerConfig(32, 8, 64, 1, 1, 256), TextConfig(64, 1, 256, 1, context_length=16))
VARIABLES = tiny.variables(CONFIG)
SOURCES = [
    "official name",
    "OpenAI's file",
    "open_clip's file",
    "open_clip's folder",
    "transformers' folder",
    "hub: open_clip",
    "hub: transformers",
    "model folder",
    "model folder, version 1",
    "workdir",
    "workdir's best step",
    "workdir's step folder",
    "workdir, before the model folder",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same model in every form that lies on a disk."""
    root = tmp_path_factory.mktemp("sources")
    save(root / "openai.pt", CONFIG, VARIABLES, "openai")
    for form in ("open_clip", "huggingface", "jax"):
        save(root / form, CONFIG, VARIABLES, form)
    shutil.copytree(root / "jax" / "variables", root / "version_1" / "variables")
    flat = {"/".join(path): leaf for path, leaf in _leaves(VARIABLES)}
    values = {"version": 1, "config": CONFIG.to_dict(), "crc32": {k: model_folder._crc32(v) for k, v in flat.items()}}
    (root / "version_1" / "clip_jax.json").write_text(json.dumps(values))
    for workdir in ("run", "old_run"):
        shutil.copytree(root / "jax", root / workdir / "checkpoints" / "7")
        (root / workdir / "config.json").write_text(json.dumps({"model": CONFIG.to_dict()}))
    (root / "run" / METRICS).write_text('{"step": 7, "eval/digits/acc1": 0.5}\n')
    old = root / "old_run" / "checkpoints" / "7"
    shutil.rmtree(old / "description")
    (old / "_CHECKPOINT_METADATA").unlink()
    return root


def _leaves(tree, path=()):
    for key, value in tree.items():
        yield from _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


@pytest.fixture(params=SOURCES)
def source(request, written, monkeypatch):
    """What a user would type for the model. What comes from a network is tested against servers elsewhere."""
    monkeypatch.setattr(download, "fetch", lambda name, root: written / "openai.pt")
    fetched = {"org/open": written / "open_clip", "org/hf": written / "huggingface"}
    monkeypatch.setattr(hub, "fetch", fetched.get)
    return {
        "official name": "ViT-B/32",
        "OpenAI's file": written / "openai.pt",
        "open_clip's file": written / "open_clip" / "open_clip_model.safetensors",
        "open_clip's folder": written / "open_clip",
        "transformers' folder": written / "huggingface",
        "hub: open_clip": "org/open",
        "hub: transformers": "org/hf",
        "model folder": written / "jax",
        "model folder, version 1": written / "version_1",
        "workdir": written / "run",
        "workdir's best step": f"{written / 'run'}@best",
        "workdir's step folder": written / "run" / "checkpoints" / "7",
        "workdir, before the model folder": written / "old_run",
    }[request.param]


def test_load_opens_it(source):
    model, variables, preprocess = clip_jax.load(source)
    assert model.config == CONFIG and preprocess.image_resolution == 32
    jax.tree.map(np.testing.assert_array_equal, variables, VARIABLES)


@pytest.mark.parametrize("form", ["jax", "huggingface"])
def test_conversion_opens_it(source, form, tmp_path):
    convert_torch_weights.main([str(source), str(tmp_path / "converted"), "--to", form])
    jax.tree.map(np.testing.assert_array_equal, clip_jax.load(tmp_path / "converted")[1], VARIABLES)


def test_evaluation_opens_it_without_a_config(source, tmp_path):
    jax.tree.map(np.testing.assert_array_equal, evaluate.load_encoders(str(source), None)[1], VARIABLES)
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (40, 50), (200 * number, 90, 30)).save(tmp_path / "photos" / name / "photo.png")
    results = tmp_path / "results.json"
    evaluate.main(["--weights", str(source), "--datasets", str(tmp_path / "photos"), "--output", str(results)])
    (row,) = json.loads(results.read_text())
    assert row["pretrained"] == str(source) and row["metrics"]["acc1"] == 0.5
