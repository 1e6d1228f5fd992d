"""OpenAI's PyTorch class with random weights that act like trained ones, and files as OpenAI saves them."""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig
from clip_jax.weights import openai
from clip_jax.weights.mapping import Leaf, leaves
from clip_jax.weights.verify import openai_classes, random_inputs

# Threads that wait for each other take far longer on shared cores than one that does all the work.
torch.set_num_threads(1)

# Standard deviation of attention's logits: neither uniform nor one-hot.
LOGIT_SPREAD = 2.0

# No two sizes are equal, and none is a round number.
ODD_VIT = CLIPConfig(
    embed_dim=37,
    vision=VisionTransformerConfig(image_resolution=35, patch_size=7, width=195, layers=3, heads=3, mlp_width=780),
    text=TextConfig(width=130, heads=2, mlp_width=520, layers=5, context_length=19, vocab_size=517),
)
ODD_RESNET = CLIPConfig(
    embed_dim=41,
    vision=ResNetConfig(image_resolution=96, width=10, layers=(1, 3, 2, 1), heads=5),
    text=TextConfig(width=66, heads=1, mlp_width=264, layers=2, context_length=13, vocab_size=203),
)


def random_openai_model(config: CLIPConfig, seed: int = 0, training: bool = False) -> torch.nn.Module:
    """OpenAI's class in float32, with weights that float16 holds where OpenAI's files have float16.

    Attention is as sharp, residual streams grow and the temperature is as in the released models. In training mode a
    ResNet's attention pool is sharp enough by itself, because BatchNorm keeps what comes in small.
    """
    classes, vision, text = openai_classes(), config.vision, config.text
    patch = None if isinstance(vision, ResNetConfig) else vision.patch_size
    with torch.device("meta"):  # PyTorch's own initialisation takes longer than all the rest
        model = classes.CLIP(
            config.embed_dim,
            vision.image_resolution,
            vision.layers,
            vision.width,
            patch,
            text.context_length,
            text.vocab_size,
            text.width,
            text.heads,
            text.layers,
        )
    model.to_empty(device="cpu").requires_grad_(False)
    for block in model.transformer.resblocks:
        block.attn_mask = model.build_attention_mask()
    _draw(model, torch.Generator().manual_seed(seed))
    if isinstance(vision, ResNetConfig) and not training:
        _temper_pool(model.visual.eval(), random_inputs(config, batch=1, seed=seed + 1)[0])
    classes.convert_weights(model)
    return model.float().train(training)


def _draw(model: torch.nn.Module, random: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=random)
        elif parameter.ndim == 1 and name.endswith("weight"):  # gains of LayerNorm and BatchNorm
            parameter.uniform_(0.5, 1.5, generator=random)
        elif "embedding" in name:
            parameter.normal_(0, 0.05, generator=random)
        elif parameter.ndim > 1:
            is_input_major = name.endswith(("proj", "text_projection"))
            fan_in = parameter.shape[0] if is_input_major else parameter[0].numel()
            parameter.normal_(0, fan_in**-0.5, generator=random)
            if "in_proj" in name:  # queries and keys of tokens that LayerNorm has just scaled
                parameter[: 2 * parameter.shape[1]] *= math.sqrt(LOGIT_SPREAD)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=random)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=random)
        else:
            buffer.zero_()
    model.logit_scale.fill_(math.log(100))


def _temper_pool(visual: torch.nn.Module, images: np.ndarray) -> None:
    """Give the attention pool's logits the blocks' standard deviation as well, on average over heads.

    Its input has grown over all residuals: drawn weights alone make it uniform in a small ResNet and one-hot in a large
    one, where PyTorch in float32 is 3e-5 away from itself in float64.
    """
    pool, maps = visual.attnpool, []
    hook = visual.layer4.register_forward_hook(lambda *arguments: maps.append(arguments[-1]))
    visual(torch.from_numpy(images).permute(0, 3, 1, 2))
    hook.remove()
    tokens = maps[0].flatten(2).mT
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
    query = pool.q_proj(tokens[:, 0]).unflatten(-1, (pool.num_heads, -1))
    keys = pool.k_proj(tokens).unflatten(-1, (pool.num_heads, -1))
    logits = torch.einsum("bhd,bkhd->bhk", query, keys) / query.shape[-1] ** 0.5
    factor = torch.sqrt(LOGIT_SPREAD / logits.std(-1).mean())
    for parameter in (*pool.q_proj.parameters(), *pool.k_proj.parameters()):
        parameter *= factor


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, computing in float64 throughout (OpenAI's LayerNorm would go through float32)."""
    for module in model.double().modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = partial(torch.nn.LayerNorm.forward, module)
        if getattr(module, "attn_mask", None) is not None:
            module.attn_mask = module.attn_mask.double()
    return model


def variables_of(tensors: Mapping[str, torch.Tensor], config: CLIPConfig) -> dict:
    """Tensors by OpenAI's names in our layout and in their own precision (files' tensors always become float32)."""

    def layer(leaf: Leaf, name: str) -> np.ndarray:
        source = openai.naming(name)
        tensor = tensors[source.key].detach().numpy()
        return leaf.from_torch(tensor if source.part is None else np.split(tensor, 3)[source.part])

    layers = {leaf: [layer(leaf, name) for name in leaf.names] for leaf in leaves(config)}
    flat = {leaf.path: np.array(each if leaf.stacked else each[0]) for leaf, each in layers.items()}
    return unflatten_dict(flat, sep="/")


def save_torchscript(model: torch.nn.Module, config: CLIPConfig, path: Path) -> None:
    """Save as OpenAI did: a traced TorchScript archive in `convert_weights`' mix of float16 and float32."""
    resolution, length = config.vision.image_resolution, config.text.context_length
    for name, size in zip(openai.SIZE_BUFFERS, (resolution, length, config.text.vocab_size), strict=True):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    inputs = torch.zeros(1, 3, resolution, resolution), torch.zeros(1, length, dtype=torch.long)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, inputs, check_trace=False)
        # Traced in float32, which a CPU computes fast; the archive's code is the same.
        openai_classes().convert_weights(model)
        torch.jit.save(traced, str(path))
    model.float()
