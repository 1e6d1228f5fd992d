"""Every kind of source, opened by everything that takes a model: the table "What opens what" of docs/weights.md."""

import json
import shutil
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image

import clip_jax
import convert_torch_weights
import evaluate
from clip_jax import model_folder
from clip_jax.errors import DamagedFile, UserError
from clip_jax.models import CLIPConfig, TextConfig, VisionTransformerConfig
from clip_jax.training.checkpoints import Checkpoints
from clip_jax.training.config import RunConfig
from clip_jax.training.guard import GuardState
from clip_jax.training.state import TrainState
from clip_jax.weights import download, hub, load_variables, save
from clip_jax.workdir import METRICS
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")

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
    "workdir's average",
    "average of the workdir's best step",
    "average of a step's folder",
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
    _write_run_with_an_average(root / "averaged")
    return root


def _write_run_with_an_average(workdir):
    """The average is the model, but for the image tower, which is frozen and has none."""
    params = VARIABLES["params"]
    average = {name: leaf for name, leaf in params.items() if name != "visual"}
    newest = jax.tree.map(lambda leaf: leaf / 2, average) | {"visual": params["visual"]}
    state = TrainState(7, newest, {}, {}, GuardState(0, 0, None), average)
    with closing(Checkpoints(workdir, RunConfig(name="averaged", model=CONFIG))) as checkpoints:
        checkpoints.save(7, jax.tree.map(jax.numpy.asarray, state))
    (workdir / METRICS).write_text('{"step": 7, "eval_ema/digits/acc1": 0.5}\n')


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
        "workdir's average": f"{written / 'averaged'}@ema",
        "average of the workdir's best step": f"{written / 'averaged'}@best@ema",
        "average of a step's folder": f"{written / 'averaged'}/checkpoints/7@ema",
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


def test_one_flipped_bit_in_an_average_is_noticed_or_changes_nothing(written, tmp_path):
    copy, named = tmp_path / "7", set()
    shutil.copytree(written / "averaged" / "checkpoints" / "7", copy)
    for file in sorted(path for path in (copy / "ema").rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for place in (0.3, 0.7):
            content = bytearray(whole)
            content[int(place * len(content))] ^= 4
            file.write_bytes(content)
            try:
                jax.tree.map(np.testing.assert_array_equal, load_variables(f"{copy}@ema")[1], VARIABLES)
            except DamagedFile as error:
                named.add(str(error).partition("is damaged: ")[2].partition(" ")[0])
        file.write_bytes(whole)
    assert any(name.startswith("ema/") for name in named), named


def test_an_average_that_nobody_kept_or_that_was_lost_is_said(written, tmp_path):
    for source, message in (
        (written / "run", "holds no average of the weights"),
        (written / "jax", "holds no average of the weights"),
        (written / "open_clip", "is no training checkpoint"),
        ("ViT-B/32", "is no training checkpoint"),
        (f"{written / 'run'}@best", "no average in .* was evaluated"),
    ):
        with pytest.raises(UserError, match=message):
            load_variables(f"{source}@ema")
    for lost in ("ema", "run"):
        copy = tmp_path / lost
        shutil.copytree(written / "averaged" / "checkpoints" / "7", copy)
        shutil.rmtree(copy / lost)
        with pytest.raises(DamagedFile, match=f"{lost}/"):
            load_variables(f"{copy}@ema")
