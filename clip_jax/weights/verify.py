"""Is it the same model? Run one input through PyTorch's and through ours, and compare every layer.

The only part of the library that imports torch. The reference is OpenAI's own class, or transformers' for its folders.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import UserError
from clip_jax.models import CLIP, CLIPConfig, Execution, ResNetConfig, normalize
from clip_jax.weights import openai, tensor_file

# Two independent float32 engines agree to about 1.4e-6 on twelve layers; these leave room for the deepest model.
HIDDEN_TOLERANCE = 5e-6  # max abs difference over max abs value
FEATURE_TOLERANCE = 2e-6  # absolute, of unit vectors
LOGIT_TOLERANCE = 1e-3  # absolute, of logits up to 100

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """How far ours is from the reference in one output.

    Attributes:
      name: of the output.
      max_abs: largest absolute difference.
      relative: that, over the largest absolute value of the reference.
      cosine: of the two, flattened.
      within: whether it is within tolerance; never if a value is not finite.
    """

    name: str
    max_abs: float
    relative: float
    cosine: float
    within: bool


def verify(form: str, path: Path, config: CLIPConfig, variables: Any) -> list[Row]:
    """Compare PyTorch's model at `path` with ours, on the same random images and tokens.

    Args:
      form: "openai", "open_clip" or "huggingface": what lies at `path`, as `formats.locate` says.
      path: the file or folder with PyTorch's weights.
      config: our model.
      variables: its weights.

    Raises:
      UserError: PyTorch is not installed, or has no class for this model.
    """
    images, tokens = random_inputs(config)
    if form == "huggingface":
        expected = transformers_outputs(path, images, tokens)
    else:
        expected = openai_outputs(openai_model(path, config), images, tokens)
    return compare(expected, our_outputs(config, variables, images, tokens))


def compare(expected: Outputs, ours: Outputs) -> list[Row]:
    """One row per output, in order."""
    return [_row(name, expected[name].astype(np.float64), ours[name].astype(np.float64)) for name in expected]


def _row(name: str, expected: np.ndarray, ours: np.ndarray) -> Row:
    if expected.shape != ours.shape:
        raise ValueError(f"{name}: the reference has shape {expected.shape}, ours {ours.shape}")
    max_abs = float(np.abs(expected - ours).max())
    relative = max_abs / float(np.abs(expected).max())
    cosine = float((expected * ours).sum() / np.sqrt((expected**2).sum() * (ours**2).sum()))
    bounds = {"features": (max_abs, FEATURE_TOLERANCE), "logits": (max_abs, LOGIT_TOLERANCE)}
    value, bound = bounds.get(name.rpartition(" ")[2], (relative, HIDDEN_TOLERANCE))
    if name == "probabilities":
        value, bound = max_abs, LOGIT_TOLERANCE
    return Row(name, max_abs, relative, cosine, within=bool(value <= bound))


def report(rows: list[Row]) -> str:
    """The rows as a table, and a verdict."""
    lines = [f"{'output':<24}{'max abs':>12}{'relative':>12}{'cosine':>14}"]
    for row in rows:
        mark = "" if row.within else "  out of tolerance"
        lines.append(f"{row.name:<24}{row.max_abs:>12.2e}{row.relative:>12.2e}{row.cosine:>14.10f}{mark}")
    outside = sum(not row.within for row in rows)
    lines.append(
        f"tolerances: hidden states {HIDDEN_TOLERANCE:g} relative, normalised features {FEATURE_TOLERANCE:g} absolute, "
        f"logits and probabilities {LOGIT_TOLERANCE:g} absolute"
    )
    lines.append(f"{outside} of {len(rows)} out of tolerance" if outside else f"all {len(rows)} within tolerance")
    return "\n".join(lines)


def random_inputs(
    config: CLIPConfig, batch: int = 2, seed: int = 0
) -> tuple[Float[np.ndarray, "batch height width 3"], Int[np.ndarray, "batch length"]]:
    """Images of about unit variance, and texts of random length: ids, the last of the vocabulary, zeros.

    The images are noise at four scales: a ResNet's pooling averages white noise away, and then all look alike to it.
    """
    rng = np.random.default_rng(seed)
    side, length, vocab = config.vision.image_resolution, config.text.context_length, config.text.vocab_size
    images = np.zeros((batch, side, side, 3), np.float32)
    for cells in (4, 8, 16, side):
        noise, cell = rng.standard_normal((batch, cells, cells, 3), np.float32), np.arange(side) * cells // side
        images += noise[:, cell][:, :, cell] / 2
    ends = rng.integers(length // 2, length, (batch, 1))
    tokens = rng.integers(0, vocab - 1, (batch, length))
    positions = np.arange(length)[None]
    tokens = np.where(positions < ends, tokens, np.where(positions == ends, vocab - 1, 0))
    return images, tokens.astype(np.int32)


def our_outputs(config: CLIPConfig, variables: Any, images: Any, tokens: Any, dtype: str = "float32") -> Outputs:
    """Hidden states, normalised features, logits and probabilities of clip_jax, at the highest matmul precision."""
    model = CLIP(config, Execution(dtype=dtype))

    def outputs(model: CLIP, images: Any, tokens: Any) -> tuple:
        text = model.text_outputs(tokens)
        features = normalize(model.encode_image(images)), normalize(text.text_features)
        hidden = (*text.hidden_states, text.last_hidden_state)
        return tuple(model.image_hidden_states(images)), hidden, *features, model(images, tokens)[0]

    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda v, i, t: model.apply(v, i, t, method=outputs))
        image_hidden, text_hidden, *rest = jax.tree.map(np.asarray, apply(variables, images, tokens))
    return _named(image_hidden, text_hidden, *rest)


def openai_outputs(model: Any, images: Any, tokens: Any) -> Outputs:
    """The same of OpenAI's class, by hooks on its blocks."""
    import torch

    image_hidden, text_hidden, image_features = [], [], []

    def keep(hidden: list, axes: tuple[int, ...]) -> Any:
        return lambda *arguments: hidden.append(np.array(arguments[-1].detach().permute(axes).numpy()))

    visual = model.visual
    if hasattr(visual, "attnpool"):
        blocks = [visual.avgpool] + [b for i in range(1, 5) for b in getattr(visual, f"layer{i}")]
        hooks = [block.register_forward_hook(keep(image_hidden, (0, 2, 3, 1))) for block in blocks]
    else:
        hooks = [visual.ln_pre.register_forward_hook(keep(image_hidden, (0, 1, 2)))]
        hooks += [b.register_forward_hook(keep(image_hidden, (1, 0, 2))) for b in visual.transformer.resblocks]
    hooks.append(visual.register_forward_hook(lambda *arguments: image_features.append(arguments[-1])))
    first = model.transformer.resblocks[0]
    hooks.append(first.register_forward_pre_hook(lambda _, inputs: keep(text_hidden, (1, 0, 2))(inputs[0])))
    hooks += [b.register_forward_hook(keep(text_hidden, (1, 0, 2))) for b in model.transformer.resblocks]
    hooks.append(model.ln_final.register_forward_hook(keep(text_hidden, (0, 1, 2))))
    with torch.no_grad():
        inputs = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
        logits = model(*inputs)[0]
        for hook in hooks:
            hook.remove()
        text_features = model.encode_text(inputs[1])
    return _named(image_hidden, text_hidden, _unit(image_features[0]), _unit(text_features), logits.numpy())


def transformers_outputs(folder: Path, images: Any, tokens: Any) -> Outputs:
    """The same of `transformers.CLIPModel`."""
    torch, clip_model = _import("torch"), _import("transformers", "CLIPModel")
    model = clip_model.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(tokens).long(),
            pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2),
            output_hidden_states=True,
        )
    vision, text = output.vision_model_output, output.text_model_output
    return _named(
        [state.numpy() for state in vision.hidden_states],
        [state.numpy() for state in (*text.hidden_states, text.last_hidden_state)],
        _unit(output.image_embeds),
        _unit(output.text_embeds),
        output.logits_per_image.numpy(),
    )


def openai_model(path: Path, config: CLIPConfig) -> Any:
    """OpenAI's class in float32 with the weights at `path`, with the activation and heads of `config`.

    Raises:
      UserError: PyTorch is not installed, or OpenAI's class cannot be made to compute this model.
    """
    torch = _import("torch")
    classes = openai_classes()
    classes.convert_weights = lambda model: None  # it would round to float16
    tensors = openai.plain_tensors(tensor_file.read(path).tensors)
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    state = {name: torch.from_numpy(np.array(tensor, np.float32)) for name, tensor in tensors.items()}
    try:
        model = classes.build_model(state).float()
    except RuntimeError as error:
        raise UserError(f"OpenAI's class cannot hold {path}, so it cannot be verified: {error}") from error
    if isinstance(config.vision, ResNetConfig):
        model.visual.attnpool.num_heads = config.vision.heads
    for tower, heads in ((model.visual, config.vision.heads), (model, config.text.heads)):
        for block in tower.transformer.resblocks if hasattr(tower, "transformer") else ():
            block.attn.num_heads, block.attn.head_dim = heads, block.attn.embed_dim // heads
            if config.activation == "gelu":
                block.mlp.gelu = torch.nn.GELU()
    return model


def openai_classes() -> ModuleType:
    """`clip/model.py` of the openai-clip package, alone: the package itself would import torchvision.

    Raises:
      UserError: it or PyTorch is not installed.
    """
    _import("torch")
    package = importlib.util.find_spec("clip")
    folders = (package and package.submodule_search_locations) or ()
    file = next((Path(folder) / "model.py" for folder in folders if (Path(folder) / "model.py").is_file()), None)
    if file is None:
        raise _not_installed("openai-clip")
    spec = importlib.util.spec_from_file_location("openai_clip_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _named(
    image_hidden: Any, text_hidden: Any, image_features: Any, text_features: Any, logits: Any
) -> Mapping[str, np.ndarray]:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (
        {f"image hidden {i}": state for i, state in enumerate(image_hidden)}
        | {f"text hidden {i}": state for i, state in enumerate(text_hidden)}
        | {"image features": image_features, "text features": text_features, "logits": logits}
        | {"probabilities": exponentials / exponentials.sum(axis=-1, keepdims=True)}
    )


def _unit(features: Any) -> np.ndarray:
    return (features / features.norm(dim=-1, keepdim=True)).detach().numpy()


def _import(name: str, attribute: str | None = None) -> Any:
    try:
        module = importlib.import_module(name)
        return getattr(module, attribute) if attribute else module
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            raise _not_installed(error.name) from error
        # A torchvision made for another torch, for example: transformers tells it in the cause.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"verifying compares with PyTorch, but importing {name} fails here: {reason}") from error


def _not_installed(name: str) -> UserError:
    return UserError(
        f"verifying compares with PyTorch, but {name} is not installed: pip install -r requirements-test.txt"
    )
