"""Hugging Face's CLIPModel and CLIPTextModel: the same hidden states, and folders that both sides read."""

import warnings

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from clip_jax.errors import UserError
from clip_jax.models import CLIP
from clip_jax.weights import load_variables, save
from clip_jax.weights.huggingface_text import load_text
from clip_jax.weights.verify import random_inputs, report, verify

TEXT = {
    "vocab_size": 311,
    "hidden_size": 60,
    "intermediate_size": 150,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 17,
    "eos_token_id": 310,
    "bos_token_id": 309,
    "projection_dim": 26,
}
VISION = {
    "hidden_size": 84,
    "intermediate_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 7,
    "image_size": 30,
    "patch_size": 6,
    "projection_dim": 26,
}


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def folder(request, tmp_path_factory):
    """A random model, saved by transformers itself."""
    act = {"hidden_act": request.param}
    config = CLIPConfig(text_config=TEXT | act, vision_config=VISION | act, projection_dim=26)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05 if "embed" in name else parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("huggingface") / request.param
    model.save_pretrained(path)
    return path, request.param


def test_every_layer(folder):
    path, activation = folder
    config, variables = load_variables(path)
    assert config.activation == activation
    assert (config.text.mlp_width, config.vision.heads, config.embed_dim) == (150, 7, 26)
    rows = verify("huggingface", path, config, variables)
    assert len(rows) == (4 + 1) + (3 + 2) + 4
    assert all(row.within for row in rows), report(rows)


def test_text_model(folder):
    path, _ = folder
    config, variables = load_variables(path)
    tokens = random_inputs(config)[1]
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(path).eval()(
            input_ids=torch.from_numpy(tokens).long(), output_hidden_states=True
        )
    ours = CLIP(config).apply(variables, tokens, method="text_outputs")
    pairs = list(zip(expected.hidden_states, ours.hidden_states, strict=True))
    pairs += [(expected.last_hidden_state, ours.last_hidden_state), (expected.pooler_output, ours.pooled_output)]
    for theirs, mine in pairs:
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=5e-6 * np.abs(theirs.numpy()).max())


def test_folder_of_the_text_tower_alone(folder, tmp_path):
    """What diffusion pipelines keep as `text_encoder`: saved by CLIPTextModel, without a projection."""
    path, activation = folder
    reference = CLIPTextModel.from_pretrained(path).eval()
    reference.save_pretrained(tmp_path / "text_encoder")
    model, variables = load_text(tmp_path / "text_encoder")
    assert (model.activation, model.embed_dim) == (activation, 60)
    tokens = random_inputs(load_variables(path)[0])[1]
    ours = jax.jit(lambda v, t: model.apply(v, t, method="outputs"))(variables, tokens)
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(tokens).long())
    for theirs, mine in (
        (expected.last_hidden_state, ours.last_hidden_state),
        (expected.pooler_output, ours.pooled_output),
        (expected.pooler_output, ours.text_features),
    ):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=5e-6 * np.abs(theirs.numpy()).max())


def test_text_tower_of_a_whole_model(folder):
    path, _ = folder
    config, variables = load_variables(path)
    model, text = load_text(path)
    assert (model.config, model.embed_dim) == (config.text, config.embed_dim)
    jax.tree.map(np.testing.assert_array_equal, text["params"], variables["params"]["text"])


def test_folder_written_here_loads_there(folder, tmp_path):
    path, _ = folder
    save(tmp_path / "ours", *load_variables(path), "huggingface")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written, info = CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    original = CLIPModel.from_pretrained(path)
    assert written.config.text_config.hidden_act == original.config.text_config.hidden_act
    expected = original.state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_bin_folder(folder, tmp_path):
    path, _ = folder
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    torch.save(CLIPModel.from_pretrained(path).state_dict(), tmp_path / "pytorch_model.bin")
    expected, found = load_variables(path), load_variables(tmp_path)
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_text_folder_is_no_whole_model(folder, tmp_path):
    CLIPTextModel.from_pretrained(folder[0]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="load_text"):
        load_variables(tmp_path)
