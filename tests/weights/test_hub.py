"""Models on the hub, against a server on this machine that answers as the hub does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import clip_jax
from clip_jax.errors import UserError
from clip_jax.weights import load_variables, save
from tests.hub_stand_in import Hub, use


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    use(monkeypatch, address=hub.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def assert_same_model(one, other):
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.mark.parametrize("form", ["huggingface", "open_clip"])
@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_model_comes_once_and_then_from_the_cache(hub, small, tmp_path, monkeypatch, form, prefix):
    save(tmp_path / "model", *small, form)
    wanted = {file.name for file in (tmp_path / "model").iterdir()}
    for name in ("README.md", "pytorch_model.bin", "open_clip_pytorch_model.bin", "flax_model.msgpack"):
        (tmp_path / "model" / name).write_bytes(b"{}")
    hub.upload("org/model.v1-x", tmp_path / "model")
    assert_same_model(small, load_variables(f"{prefix}org/model.v1-x"))
    assert hub.fetched == wanted
    hub.requests.clear()
    model, variables, _ = clip_jax.load(f"{prefix}org/model.v1-x")
    assert_same_model(small, (model.config, variables))
    assert not hub.fetched
    use(monkeypatch, offline=True)
    hub.requests.clear()
    assert_same_model(small, load_variables(f"{prefix}org/model.v1-x"))
    assert not hub.requests
    use(monkeypatch, address="http://127.0.0.1:9")
    assert_same_model(small, load_variables(f"{prefix}org/model.v1-x"))


def test_shards_by_their_index(hub, small, tmp_path):
    save(tmp_path / "model", *small, "huggingface")
    whole = tmp_path / "model" / "model.safetensors"
    tensors = sorted(load_file(whole).items())
    parts = {"model-1-of-2.safetensors": dict(tensors[:9]), "model-2-of-2.safetensors": dict(tensors[9:])}
    for name, part in parts.items():
        save_file(part, tmp_path / "model" / name)
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()
    hub.upload("org/sharded", tmp_path / "model")
    assert_same_model(small, load_variables("org/sharded"))


def test_a_model_folder_of_ours(hub, small, tmp_path, monkeypatch):
    save(tmp_path / "model", *small, "jax")
    hub.upload("org/ours", tmp_path / "model")
    assert_same_model(small, load_variables("org/ours"))
    use(monkeypatch, offline=True)
    assert_same_model(small, load_variables("org/ours"))


def test_a_repository_with_both_forms_is_read_as_open_clips(hub, small, tmp_path):
    """timm's repositories have a config.json that is not transformers', beside open_clip's files."""
    save(tmp_path / "model", *small, "open_clip")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text('{"architecture": "vit_base_patch32_clip_224"}')
    hub.upload("timm/model", tmp_path / "model")
    assert_same_model(small, load_variables("timm/model"))
    assert "model.safetensors" not in hub.fetched
    assert_same_model(small, load_variables(tmp_path / "model"))


def test_what_lies_here_is_not_asked_of_the_hub(hub, small, tmp_path):
    save(tmp_path / "org" / "model", *small, "open_clip")
    assert_same_model(small, load_variables("org/model"))
    assert not hub.requests


def test_what_the_hub_does_not_have(hub, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("a language model")
    hub.upload("org/other", tmp_path / "other")
    hub.repositories["org/gated"] = "GatedRepo"
    absent = r"^'{}' is no file or folder here, and the hub has no such model \(or it is private\)$"
    for name, message in {
        "runs/nonexistent": absent.format("runs/nonexistent"),
        "org/double--dash..dots": absent.format("org/double--dash..dots"),
        "org/other": r"org/other on the hub holds no CLIP model that clip_jax reads: expected description/",
        "org/gated": "to those who accepted its terms",
    }.items():
        with pytest.raises(UserError, match=message):
            load_variables(name)
    with pytest.raises(UserError, match=r"'ViT-B/33' is neither a file nor a folder; did you mean ViT-B/32"):
        load_variables("ViT-B/33")


@pytest.mark.parametrize("offline", [False, True])
def test_no_network_is_said_at_once(hub, monkeypatch, offline):
    use(monkeypatch, address="http://127.0.0.1:9", offline=offline)
    message = (
        f"nor in the cache of models from the hub, and the hub cannot be asked: .*{'offline' if offline else 'refused'}"
    )
    with pytest.raises(UserError, match=message) as error:
        load_variables("runs/nonexistent")
    assert "\n" not in str(error.value) and not hub.requests


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"no file or folder here; .* pip install huggingface_hub"):
        load_variables("org/model")


def test_the_script_follows_the_environment(hub, small, tmp_path):
    script = Path(__file__).parents[2] / "convert_torch_weights.py"
    save(tmp_path / "model", *small, "open_clip")
    hub.upload("org/model", tmp_path / "model")

    def convert(source, **variables):
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.address} | variables
        command = [sys.executable, script, source, tmp_path / "out", "--to", "open_clip"]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = convert("hf-hub:org/model")
    assert done.returncode == 0, done.stderr
    assert_same_model(small, load_variables(tmp_path / "out"))
    done = convert("runs/nonexistent", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.startswith("error: 'runs/nonexistent' is no file or folder here")
    assert done.stderr.count("\n") == 1 and "HF_HUB_OFFLINE" in done.stderr
