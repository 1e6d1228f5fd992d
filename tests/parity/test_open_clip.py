"""open_clip itself, where it is installed (it needs torchvision): it loads our folders, and we load its weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict

from clip_jax.weights import load_variables, save
from clip_jax.weights.mapping import leaves
from clip_jax.weights.verify import our_outputs, random_inputs
from tests.reference_models import ODD_RESNET, ODD_VIT

open_clip = pytest.importorskip("open_clip")

# Other head and MLP widths than OpenAI's class can have.
WIDE = dataclasses.replace(
    ODD_VIT,
    activation="gelu",
    vision=dataclasses.replace(ODD_VIT.vision, heads=15, mlp_width=585),
    text=dataclasses.replace(ODD_VIT.text, heads=10, mlp_width=390),
)


def random_variables(config):
    rng = np.random.default_rng(0)
    flat = {leaf.path: 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves(config)}
    flat = {path: np.abs(array) + 0.5 if path.endswith("/var") else array for path, array in flat.items()}
    flat["params/logit_scale"] = np.full((), 4.6, np.float32)
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("config", [ODD_VIT, WIDE, ODD_RESNET], ids=["vit", "wide gelu vit", "resnet"])
def test_folder_loads_there_and_back(config, tmp_path):
    variables = random_variables(config)
    save(tmp_path / "ours", config, variables, "open_clip")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    images, tokens = random_inputs(config)
    with torch.no_grad():
        theirs = {
            "image features": model.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2), normalize=True),
            "text features": model.encode_text(torch.from_numpy(tokens).long(), normalize=True),
        }
    ours = our_outputs(config, variables, images, tokens)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected.numpy(), rtol=0, atol=2e-6)
    (tmp_path / "ours" / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ours" / "open_clip_pytorch_model.bin")
    again = load_variables(tmp_path / "ours")
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], variables)
