"""OpenAI's weights and the values that their README prints; needs the internet."""

import io
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

import clip_jax
import convert_torch_weights
from clip_jax.models import parameter_count

PICTURE = "https://raw.githubusercontent.com/openai/CLIP/main/CLIP.png"
TEXTS = ["a diagram", "a dog", "a cat"]

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def picture():
    with urllib.request.urlopen(PICTURE, timeout=60) as response:
        return Image.open(io.BytesIO(response.read()))


def test_probabilities_of_the_readme(picture):
    model, variables, preprocess = clip_jax.load("ViT-B/32")
    logits, _ = model.apply(variables, preprocess(picture)[None], clip_jax.tokenize(TEXTS))
    # Printed on a GPU, in float16.
    np.testing.assert_allclose(jax.nn.softmax(logits)[0], [0.9927937, 0.00421068, 0.00299572], atol=1e-3)


@pytest.mark.parametrize("name", clip_jax.available_models())
def test_official_file(name, picture, tmp_path):
    """Each file holds the architecture of its name, sees a diagram, and is the same model as in PyTorch."""
    assert convert_torch_weights.main([name, str(tmp_path / "jax"), "--verify"]) == 0
    model, variables, preprocess = clip_jax.load(tmp_path / "jax")
    assert model.config == clip_jax.models.OPENAI_MODELS[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameter_count(model.config)
    logits, _ = model.apply(variables, preprocess(picture)[None], clip_jax.tokenize(TEXTS))
    assert jax.nn.softmax(logits)[0, 0] > 0.9
