import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import clip_jax
from clip_jax.weights.mapping import leaves
from tests.reference_models import ODD_RESNET, ODD_VIT, random_openai_model, save_torchscript


@pytest.fixture(scope="session", params=["vit", "resnet"])
def archive(request, tmp_path_factory):
    """(PyTorch model, config, TorchScript file as OpenAI saves it), for a small model of each image tower."""
    config = {"vit": ODD_VIT, "resnet": ODD_RESNET}[request.param]
    model = random_openai_model(config)
    path = tmp_path_factory.mktemp("openai") / f"{request.param}.pt"
    save_torchscript(model, config, path)
    return model, config, path


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """(config, variables) of a model of a few kilobytes."""
    config = clip_jax.CLIPConfig.from_dict(
        {
            "embed_dim": 4,
            "vision": {
                "type": "vit",
                "image_resolution": 8,
                "patch_size": 4,
                "width": 6,
                "layers": 2,
                "heads": 2,
                "mlp_width": 10,
            },
            "text": {"width": 6, "heads": 3, "mlp_width": 8, "layers": 1, "context_length": 5, "vocab_size": 11},
            "activation": "gelu",
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
        }
    )
    return config, random_variables(config)


def random_variables(config, seed=0):
    rng = np.random.default_rng(seed)
    flat = {leaf.path: rng.standard_normal(leaf.shape, np.float32) for leaf in leaves(config)}
    return unflatten_dict(flat, sep="/")
