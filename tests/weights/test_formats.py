import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import clip_jax
import convert_torch_weights
from clip_jax.errors import UserError
from clip_jax.weights import WRITERS, load_variables, open_clip, openai, save, verify
from clip_jax.weights.tensor_file import read
from clip_jax.weights.verify import openai_classes, openai_model
from tests.reference_models import save_torchscript

ROOT = Path(__file__).parents[2]


def assert_same_model(one, other):
    assert one[0] == other[0]
    assert jax.tree.structure(one[1]) == jax.tree.structure(other[1])
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


def test_torchscript_archive(archive):
    model, config, path = archive
    found, variables = load_variables(path)
    assert found == config
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    ours = read(path).tensors
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    assert variables["params"]["logit_scale"] == np.float32(np.log(100))
    assert ours["text_projection"].dtype == np.float16
    assert not ours["text_projection"].flags.writeable


@pytest.mark.parametrize("to", WRITERS)
def test_round_trip_is_bit_exact(archive, tmp_path, to):
    _, config, path = archive
    target = tmp_path / "out" / to
    original = load_variables(path)
    jax.tree.map(lambda leaf: np.add(leaf, np.float32(1e-7), out=leaf), original[1])  # no longer representable in fp16
    if to == "huggingface" and not hasattr(config.vision, "patch_size"):
        with pytest.raises(UserError, match="ResNet"):
            save(target, *original, to)
        assert not target.exists()
        return
    save(target, *original, to)
    assert_same_model(original, load_variables(target))
    with pytest.raises(UserError, match="exists"):
        save(target, *original, to)


@pytest.mark.parametrize("to", ["jax", "open_clip", "huggingface"])
def test_everything_in_the_config_travels(small, tmp_path, to):
    config, variables = small
    if to == "open_clip":  # its heads are all of one width, and OpenAI's names say nothing of heads
        config = dataclasses.replace(config, logit_bias=True)
        variables = {"params": variables["params"] | {"logit_bias": np.float32(-3).reshape(())}}
    save(tmp_path / to, config, variables, to)
    assert_same_model((config, variables), load_variables(tmp_path / to))


def test_openai_class_loads_what_is_written(archive, tmp_path):
    model, _, path = archive
    save(tmp_path / "out.pt", *load_variables(path), "openai")
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    rebuilt = openai_classes().build_model(state)
    assert rebuilt.visual.conv1.weight.dtype == torch.float16
    assert torch.equal(rebuilt.float().text_projection, model.text_projection)


def test_openai_format_refuses_what_its_class_cannot_compute(small, tmp_path):
    with pytest.raises(UserError, match="activation"):
        save(tmp_path / "out.pt", *small, "openai")
    assert not list(tmp_path.iterdir())


def test_state_dicts_of_training_runs(archive, tmp_path):
    """Of whatever wraps the model; its odd sizes need open_clip's configuration, which says the activation too."""
    model, config, path = archive
    (tmp_path / "model.json").write_text(json.dumps(open_clip.config_to_json(config)["model_cfg"]))
    names = {
        n: t for n, t in model.state_dict().items() if n not in ("input_resolution", "context_length", "vocab_size")
    }
    names["logit_scale"] = names["logit_scale"].reshape(1)
    text = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    custom = {f"module.{'text.' if n.startswith(text) else ''}{n}": t for n, t in names.items()}
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": custom, "optimizer": {"state": {0: {"step": 1}}}}, tmp_path / "a.pt"
    )
    save_file({n: t.numpy() for n, t in names.items()}, tmp_path / "b.safetensors")
    save_file({n: t.double().numpy() for n, t in names.items()}, tmp_path / "c.safetensors")
    for prefix in ("model", "clip", "_orig_mod", "module._orig_mod"):
        torch.save({"state_dict": {f"{prefix}.{n}": t for n, t in names.items()}}, tmp_path / f"{prefix}.ckpt")
    expected = load_variables(path)
    for file in sorted({*tmp_path.iterdir()} - {tmp_path / "model.json"}):
        assert_same_model(expected, load_variables(file, model_config=tmp_path / "model.json"))
    torch.save({n: t.bfloat16() for n, t in names.items()}, tmp_path / "d.bin")
    _, rounded = load_variables(tmp_path / "d.bin", model_config=tmp_path / "model.json")
    scale = names["ln_final.weight"].bfloat16().float().numpy()
    np.testing.assert_array_equal(rounded["params"]["text"]["ln_final"]["scale"], scale)


def test_activation_that_contradicts_the_file(archive):
    with pytest.raises(UserError, match="quick_gelu"):
        load_variables(archive[2], activation="gelu")


def test_gelu_in_a_torchscript_archive(tmp_path, archive):
    _, config, path = archive
    replaced = openai_model(path, dataclasses.replace(config, activation="gelu"))
    for block in replaced.transformer.resblocks:
        block.mlp.gelu = torch.nn.GELU()
    save_torchscript(replaced, config, tmp_path / "gelu.pt")
    assert load_variables(tmp_path / "gelu.pt")[0].activation == "gelu"


def test_files_that_do_not_fit_are_listed(archive, tmp_path):
    state = archive[0].state_dict()
    moved = state.pop("ln_final.bias")
    state["ln_final.beta"] = moved
    state["text_projection"] = state["text_projection"][:-1]
    state["visual.conv1.weight"] = state["visual.conv1.weight"].to(torch.int8)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError) as error:
        load_variables(tmp_path / "bad.pt")
    message = str(error.value)
    assert f"1 missing: ln_final.bias {tuple(moved.shape)}" in message
    assert f"1 not part of the model: ln_final.beta {tuple(moved.shape)}" in message
    assert "1 of the wrong shape: text_projection is" in message
    assert "1 of a type that holds no weights: visual.conv1.weight is int8" in message


def test_many_misfits_are_shortened(archive, tmp_path):
    state = {n: t for n, t in archive[0].state_dict().items() if "resblocks" not in n or n.endswith("c_fc.weight")}
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"missing: .*, …") as error:
        load_variables(tmp_path / "bad.pt")
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_so400m"),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "pool_type", "avg"),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "no_causal_mask", True),
        ("model_cfg", "multimodal_cfg", {}),
        ("preprocess_cfg", "resize_mode", "longest"),
        ("preprocess_cfg", "interpolation", "random"),
        ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
    ],
)
def test_open_clip_settings_that_mean_another_model(small, tmp_path, section, field, value):
    save(tmp_path / "m", *small, "open_clip")
    file = tmp_path / "m" / "open_clip_config.json"
    values = json.loads(file.read_text())
    target = values["model_cfg"].get(section, values.get(section))
    target[field] = value or {"layers": 1}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=field):
        load_variables(tmp_path / "m")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_cfg", "layers", 10**9),
        ("vision_cfg", "layers", [1, 10**9, 1, 1]),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "width", "x"),
        ("text_cfg", "mlp_ratio", float("nan")),
        ("text_cfg", "mlp_ratio", "x"),
        ("preprocess_cfg", "mean", [0.5]),
        ("preprocess_cfg", "std", [1.0, 1.0, 0.0]),
    ],
)
def test_open_clip_settings_that_make_no_sense(small, section, field, value):
    values = open_clip.config_to_json(small[0])
    values["model_cfg"].get(section, values.get(section))[field] = value
    with pytest.raises(UserError):
        open_clip.config_from_json(values, "a file")


def test_mlp_widths_survive_open_clips_ratio(small):
    """int(width * (mlp_width / width)) is one less than mlp_width for one pair in forty."""
    for width in range(1, 40):
        for mlp_width in range(1, 5 * width):
            text = dataclasses.replace(small[0].text, width=width, heads=1, mlp_width=mlp_width)
            config = dataclasses.replace(small[0], text=text)
            assert open_clip.config_from_json(open_clip.config_to_json(config), "a file") == config


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("text_config", "num_hidden_layers", 10**9, "at most"),
        ("vision_config", "hidden_size", 2**40, "at most"),
        ("text_config", "layer_norm_eps", 1e-6, "layer_norm_eps"),
        ("vision_config", "hidden_act", "quick_gelu", "hidden_act"),
        ("text_config", "hidden_act", "relu", "hidden_act"),
        ("text_config", "eos_token_id", 5, "eos_token_id"),
        ("vision_config", "num_channels", 4, "num_channels"),
        (None, "model_type", "siglip", "model_type"),
        ("vision_config", "patch_size", 5, "multiple"),
        ("vision_config", "patch_size", "x", "patch_size"),
    ],
)
def test_huggingface_settings_that_mean_another_model(small, tmp_path, section, field, value, message):
    save(tmp_path / "m", *small, "huggingface")
    file = tmp_path / "m" / "config.json"
    values = json.loads(file.read_text())
    (values[section] if section else values)[field] = value
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_variables(tmp_path / "m")


def test_sharded_huggingface_folder(small, tmp_path):
    save(tmp_path / "m", *small, "huggingface")
    whole = tmp_path / "m" / "model.safetensors"
    tensors = sorted(load_file(whole).items())
    parts = {"a.safetensors": dict(tensors[:9]), "b.safetensors": dict(tensors[9:])}
    for name, part in parts.items():
        save_file(part, tmp_path / "m" / name)
    index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    assert_same_model(small, load_variables(tmp_path / "m"))
    index["weight_map"]["logit_scale"] = "../a.safetensors"
    for bad, message in ((index, "outside"), ({"weight_map": []}, "no weight_map")):
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            load_variables(tmp_path / "m")


def test_safetensors_library_reads_ours(small, tmp_path):
    save(tmp_path / "m", *small, "open_clip")
    path = tmp_path / "m" / "open_clip_model.safetensors"
    theirs, ours = load_file(path), read(path).tensors
    expected = openai.state_dict(*small)
    assert expected.keys() == ours.keys()
    for name in expected:
        assert theirs[name].shape == ours[name].shape == expected[name].shape, name
        np.testing.assert_array_equal(theirs[name], ours[name])


def test_converted_checkpoint_without_its_arrays(small, tmp_path):
    save(tmp_path / "m", *small, "jax")
    for file in (tmp_path / "m" / "variables").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_variables(tmp_path / "m")


@pytest.mark.parametrize("to", ["jax", "openai", "open_clip"])
def test_target_that_cannot_be_written(archive, tmp_path, to):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file" / "model", *load_variables(archive[2]), to)


def test_format_that_does_not_exist(small, tmp_path):
    with pytest.raises(UserError, match="'onnx'; expected one of jax"):
        save(tmp_path / "m", *small, "onnx")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"neither a file nor a folder.*a name on the hub \(ORG/NAME\)$"),
        ("ViT-B-32", r"did you mean ViT-B/32"),
        ("vit-l/16", r"did you mean ViT-L/14"),
        ("../no/such/folder", "neither"),
        (".", "no folder of weights"),
    ],
)
def test_sources_that_are_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_variables(name)


def test_public_face(archive, tmp_path):
    model, variables, preprocess = clip_jax.load(archive[2], dtype="bfloat16")
    side = model.config.vision.image_resolution
    assert model.config == archive[1] and preprocess.image_resolution == side
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    image = np.zeros((1, side, side, 3), np.float32)
    features = jax.eval_shape(lambda v: model.apply(v, image, method=model.encode_image), variables)
    assert features.dtype == jax.numpy.bfloat16
    assert clip_jax.available_models()[5] == "ViT-B/32"


def test_import_needs_neither_torch_nor_tensorflow():
    code = "import clip_jax, sys; print([m for m in ('torch', 'tensorflow', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_script_converts_both_ways_and_verifies(archive, tmp_path, capsys, monkeypatch):
    path = str(archive[2])
    assert convert_torch_weights.main([path, str(tmp_path / "jax"), "--verify"]) == 0
    table = capsys.readouterr().out
    assert "text features" in table and table.splitlines()[-1].startswith("all ")
    assert (
        convert_torch_weights.main([str(tmp_path / "jax"), str(tmp_path / "a.pt"), "--to", "openai", "--verify"]) == 0
    )
    with pytest.raises(UserError, match="both SRC and DST"):
        convert_torch_weights.main([str(tmp_path / "jax"), str(tmp_path / "b"), "--verify"])

    def corrupt(target, config, variables, _):
        variables["params"]["visual"]["conv1"]["kernel"][0, 0, 0, 0] += 0.01
        save(target, config, variables, "jax")

    monkeypatch.setattr(convert_torch_weights, "save", corrupt)
    assert convert_torch_weights.main([path, str(tmp_path / "c"), "--verify"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert "out of tolerance" in table[-1] and any("image features" in line and "tolerance" in line for line in table)
    assert not any("text" in line and "out of tolerance" in line for line in table)


@pytest.mark.parametrize("package", ["torch", "clip"])
def test_verify_without_its_packages(archive, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install -r requirements-test\.txt"):
        openai_model(archive[2], archive[1])


def test_verify_with_a_broken_torchvision(small, tmp_path, monkeypatch):
    """transformers imports a module when its class is asked for, and torchvision with it."""

    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            raise ModuleNotFoundError(f"Could not import module {name!r}") from RuntimeError("no operator nms")

    monkeypatch.setitem(sys.modules, "transformers", Lazy("transformers"))
    save(tmp_path / "m", *small, "huggingface")
    with pytest.raises(UserError, match="importing transformers fails here: no operator nms"):
        verify.verify("huggingface", tmp_path / "m", *small)


def test_verify_notices_one_wrong_number(archive):
    _, config, path = archive
    variables = load_variables(path)[1]
    variables["params"]["text"]["transformer"]["resblocks"]["mlp"]["c_fc"]["bias"][1, 2] += 0.01
    rows = {row.name: row.within for row in verify.verify("openai", path, config, variables)}
    assert rows["text hidden 1"] and not rows["text hidden 2"] and rows["image features"]
    variables["params"]["logit_scale"] = np.float32(np.nan)
    assert not any(row.within for row in verify.verify("openai", path, config, variables) if row.name == "logits")


def test_script_ends_with_one_line_and_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "convert_torch_weights.py", str(tmp_path / "nothing"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
