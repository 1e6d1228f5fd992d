"""Files without their configuration: read as OpenAI's models, unless they betray, or the user says, something else."""

import argparse
import dataclasses
import json
import pathlib
import sys
import types
from collections import defaultdict

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import clip_jax
import convert_torch_weights
from clip_jax.errors import UserError
from clip_jax.models import TextConfig, VisionTransformerConfig
from clip_jax.weights import load_variables, open_clip, openai, save
from tests.weights.conftest import random_variables

VIT = clip_jax.CLIPConfig(
    embed_dim=8,
    vision=VisionTransformerConfig(image_resolution=8, patch_size=4, width=128, layers=1, heads=2, mlp_width=8),
    text=TextConfig(width=64, heads=1, mlp_width=8, layers=1, context_length=5),
    activation="gelu",
)
NARROW_HEADS = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, heads=8))


def bare(path, config, **changes):
    """A file of a model's tensors alone, some of them changed."""
    tensors = openai.state_dict(config, random_variables(config)) | changes
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


def described(path, config, **fields):
    """open_clip's JSON file of a model."""
    path.write_text(json.dumps(open_clip.config_to_json(config)["model_cfg"] | fields))
    return path


def refused(message, path, **options):
    with pytest.raises(UserError, match=message) as error:
        load_variables(path, **options)
    assert path.name in str(error.value)


def test_what_is_like_openais_models_needs_only_its_activation(tmp_path):
    path = bare(tmp_path / "a.safetensors", VIT)
    assert load_variables(path, activation="gelu")[0] == VIT
    refused("--activation quick_gelu", path)


def altered(tower, **fields):
    return dataclasses.replace(VIT, **{tower: dataclasses.replace(getattr(VIT, tower), **fields)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (altered("text", vocab_size=11), "vocabulary of 11, not OpenAI's 49,408"),
        (altered("text", width=40), "text tower 40 wide, not a multiple of 64"),
        (altered("text", width=80), "text tower 80 wide, not a multiple of 64"),
        (altered("vision", width=160), "image tower 160 wide, not a multiple of 64"),
        (altered("vision", width=1280), "image tower 1280 wide, whose heads may be wider than OpenAI's 64"),
    ],
    ids=["vocabulary", "no head", "text width", "image width", "wide"],
)
def test_what_betrays_another_model_needs_its_configuration(tmp_path, config, message):
    path = bare(tmp_path / "a.safetensors", config)
    for activation in (None, "gelu"):
        refused(f"{message}.*--model_config", path, activation=activation)
    assert load_variables(path, model_config=described(tmp_path / "model.json", config))[0] == config


def test_a_configuration_that_the_user_names(tmp_path):
    """Eight heads of 16 look like two of 64: only the configuration tells them apart."""
    path = bare(tmp_path / "a.safetensors", NARROW_HEADS)
    config_file = described(tmp_path / "model.json", NARROW_HEADS)
    assert load_variables(path, activation="gelu")[0] == VIT
    assert load_variables(path, model_config=config_file)[0] == NARROW_HEADS
    assert load_variables(path, model_config=config_file, activation="gelu")[0] == NARROW_HEADS
    assert clip_jax.load(path, model_config=str(config_file))[0].config == NARROW_HEADS
    (tmp_path / "whole.json").write_text(json.dumps(open_clip.config_to_json(NARROW_HEADS)))  # with its `model_cfg`
    convert = ["--to", "open_clip", "--model_config", str(tmp_path / "whole.json")]
    assert convert_torch_weights.main([str(path), str(tmp_path / "out"), *convert]) == 0
    assert load_variables(tmp_path / "out")[0] == NARROW_HEADS


def test_a_configuration_as_open_clip_writes_them(tmp_path):
    """Fields that are missing are as in open_clip: heads 64 wide, an MLP four times as wide, GELU."""
    config = dataclasses.replace(
        VIT,
        vision=VisionTransformerConfig(
            image_resolution=224, patch_size=32, width=128, layers=1, heads=2, mlp_width=512
        ),
        text=TextConfig(width=64, heads=1, mlp_width=256, layers=1),
    )
    model = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 128, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    path = bare(tmp_path / "a.safetensors", config)
    assert load_variables(path, model_config=tmp_path / "model.json")[0] == config


def test_configurations_that_contradict(tmp_path):
    path = bare(tmp_path / "a.safetensors", VIT)
    config_file = described(tmp_path / "model.json", VIT)
    refused("says gelu for .*, which was made with quick_gelu", path, model_config=config_file, activation="quick_gelu")
    sizes = {name: np.array(1) for name in openai.SIZE_BUFFERS}  # as only OpenAI's files have them
    refused(
        "says gelu for .*, which was made with quick_gelu",
        bare(tmp_path / "b.pt", VIT, **sizes),
        model_config=config_file,
    )
    wrong = described(tmp_path / "wrong.json", dataclasses.replace(VIT, embed_dim=9))
    refused("text_projection is", path, model_config=wrong)
    refused("expected a small JSON file at", tmp_path / "a.safetensors", model_config=tmp_path / "a.safetensors.json")
    save(tmp_path / "folder", *load_variables(path, activation="gelu"), "open_clip")
    refused("comes with its own configuration", tmp_path / "folder", model_config=config_file)


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "pool_type", "eos"),
        ("text_cfg", "hf_tokenizer_name", "facebook/xlm-v-base"),
        ("text_cfg", "act_kwargs", {"approximate": "tanh"}),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "ls_init_value", 1e-4),
        ("vision_cfg", "timm_model_name", "convnext_base"),
    ],
)  # fmt: skip
def test_configurations_that_this_architecture_cannot_express(tmp_path, tower, field, value):
    model = open_clip.config_to_json(VIT)["model_cfg"]
    model[tower][field] = value
    (tmp_path / "model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match=rf"model\.json: {tower} sets {field}=.*does not have"):
        load_variables(bare(tmp_path / "a.safetensors", VIT), model_config=tmp_path / "model.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("visual.trunk.patch_embed.proj.weight", "image tower of timm"),  # open_clip's SigLIP
        ("module.visual.trunk.stem.0.weight", "image tower of timm"),  # and ConvNeXt
        ("text.transformer.embeddings.word_embeddings.weight", "text tower of transformers"),
        ("text_decoder.resblocks.0.ln_1.weight", "CoCa"),
        ("vision_model.embeddings.patch_embedding.weight", r"transformers' names, which need its config\.json"),
        ("something.else", "holds no CLIP model"),
    ],
)
def test_models_of_another_kind_are_named(tmp_path, name, message):
    save_file({name: np.zeros(8, np.float32)}, tmp_path / "a.safetensors")
    refused(message, tmp_path / "a.safetensors")


@pytest.mark.parametrize(("kind", "name"), [("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2")])
def test_quantised_weights_are_named(tmp_path, kind, name):
    save_file({"ln_final.weight": np.ones(64, getattr(ml_dtypes, kind))}, tmp_path / "a.safetensors")
    torch.save({"ln_final.weight": torch.ones(64).to(getattr(torch, kind))}, tmp_path / "a.pt")
    refused(f"type {name}; save the model in float32", tmp_path / "a.safetensors")
    refused(f"type torch.{kind}; save the model in float32", tmp_path / "a.pt")


def test_float64_is_rounded_as_pytorch_rounds_it(tmp_path):
    projection = np.random.default_rng(0).standard_normal((64, 8))
    _, variables = load_variables(bare(tmp_path / "a.safetensors", VIT, text_projection=projection), activation="gelu")
    rounded = torch.zeros(64, 8).copy_(torch.from_numpy(projection)).numpy()
    np.testing.assert_array_equal(jax.tree.leaves(variables["params"]["text"]["text_projection"])[0], rounded)
    projection[3, 4] = 1e39
    refused(
        "not finite.*in 1 tensors; text_projection has 1",
        bare(tmp_path / "b.safetensors", VIT, text_projection=projection),
        activation="gelu",
    )


def test_numbers_that_are_not_finite_are_named(tmp_path):
    projection, weight = np.zeros((64, 8), np.float32), np.zeros((64 * 3, 64), np.float32)
    projection[1, :3], weight[70, 0] = np.nan, np.inf
    path = bare(
        tmp_path / "a.safetensors",
        VIT,
        **{"text_projection": projection, "transformer.resblocks.0.attn.in_proj_weight": weight},
    )
    refused(
        r"not finite \(NaN or infinity\) in 2 tensors; text_projection has 3 of them among 512", path, activation="gelu"
    )


class AttributeDict(dict):
    """What Lightning keeps hyper-parameters in, under a name that stays when it is pickled."""


AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"


def test_what_training_scripts_keep_beside_the_weights(tmp_path, monkeypatch):
    """Settings, paths and scores are passed over, whatever they hold; nothing of them is made."""
    variables = random_variables(VIT)
    state = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in openai.state_dict(VIT, variables).items()}
    module = types.ModuleType(AttributeDict.__module__)
    module.AttributeDict = AttributeDict
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", AttributeDict.__module__):
        monkeypatch.setitem(sys.modules, name, module)
    checkpoint = {
        "hyper_parameters": AttributeDict(lr=1e-3),
        "state_dict": state,
        "args": argparse.Namespace(lr=1e-3, output=pathlib.Path("/x"), nested=argparse.Namespace(), tags={"a"}),
        "best": np.float64(0.5),
        "curve": np.arange(3),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "sizes": torch.Size([1, 2]),
        "counts": defaultdict(int, {"x": 1}),
    }
    torch.save(checkpoint, tmp_path / "a.ckpt")
    _, found = load_variables(tmp_path / "a.ckpt", activation="gelu")
    jax.tree.map(np.testing.assert_array_equal, found, variables)
