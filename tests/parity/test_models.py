"""Every hidden state, feature and logit of the nine models at full size, against OpenAI's PyTorch class.

Each model is saved as OpenAI saves it, converted by the script and read back.
"""

import jax
import numpy as np
import pytest

import convert_torch_weights
from clip_jax.models import OPENAI_MODELS
from clip_jax.weights import load_variables
from clip_jax.weights.verify import compare, openai_outputs, our_outputs, random_inputs
from tests.reference_models import ODD_RESNET, ODD_VIT, in_float64, random_openai_model, save_torchscript, variables_of

MODELS = {"odd ViT": ODD_VIT, "odd ResNet": ODD_RESNET, **OPENAI_MODELS}
BY_DEFAULT = ("odd ViT", "odd ResNet", "RN50", "RN50x4", "ViT-B/32", "ViT-B/16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in MODELS]
)
def test_same_model(name, tmp_path):
    config = MODELS[name]
    reference = random_openai_model(config)
    save_torchscript(reference, config, tmp_path / "openai.pt")
    assert convert_torch_weights.main([str(tmp_path / "openai.pt"), str(tmp_path / "jax")]) == 0
    (tmp_path / "openai.pt").unlink()
    found, variables = load_variables(tmp_path / "jax")
    assert found == config
    images, tokens = random_inputs(config)
    expected = openai_outputs(reference, images, tokens)
    del reference
    full = compare(expected, our_outputs(found, variables, images, tokens))
    half = compare(expected, our_outputs(found, variables, images, tokens, "bfloat16"))
    print(f"| {name} | {_summary(full)} | {_summary(half)} |")
    _check_float32(full, expected, config)
    _check_bfloat16(half)


@pytest.mark.parametrize("config", [ODD_VIT, ODD_RESNET], ids=["vit", "resnet"])
def test_same_function(config):
    """In float64 nothing is left to rounding: every hidden state and output has nine digits in common, on any CPU."""
    reference = in_float64(random_openai_model(config))
    images, tokens = random_inputs(config)
    images = images.astype(np.float64)
    expected = openai_outputs(reference, images, tokens)
    with jax.enable_x64(True):
        ours = our_outputs(config, variables_of(reference.state_dict(), config), images, tokens, "float64")
    for row in compare(expected, ours):
        assert ours[row.name].dtype == np.float64
        assert row.relative <= 1e-9, row


def _check_float32(rows, expected, config):
    blocks = config.vision.layers if isinstance(config.vision.layers, int) else sum(config.vision.layers)
    # Inputs and outputs of all blocks; of the text tower also the last output through ln_final.
    assert len(rows) == (blocks + 1) + (config.text.layers + 2) + 4
    for row in rows:
        assert np.abs(expected[row.name]).max() > 0.01, f"{row.name} is too small to show anything"
        if "hidden" in row.name:
            assert row.relative <= 5e-6, row
        elif "features" in row.name:
            assert row.relative <= 2e-6, row  # stricter than absolute: the largest value is about 0.1
        else:
            assert row.max_abs <= 1e-3, row


def _check_bfloat16(rows):
    """bfloat16 has 8 bits: 0.4 % a rounding, which grows to 2 % of the largest value over twelve blocks."""
    for row in rows:
        if "hidden" in row.name:
            assert row.relative <= 4e-2 and row.cosine >= 0.999, row
        elif "features" in row.name:
            assert row.max_abs <= 1e-2 and row.cosine >= 0.999, row
        elif row.name == "logits":
            assert row.max_abs <= 1.0, row


def _summary(rows):
    """Cells of the table in docs/weights.md: the worst of the hidden states, of the features, and the logits."""
    hidden, features = ([row for row in rows if kind in row.name] for kind in ("hidden", "features"))
    logits = next(row.max_abs for row in rows if row.name == "logits")
    cosine = min(row.cosine for row in (*hidden, *features))
    worst = [max(row.relative for row in kind) for kind in (hidden, features)]
    return f"{worst[0]:.1e} | {worst[1]:.1e} | {logits:.1e} | {cosine:.6f}"
