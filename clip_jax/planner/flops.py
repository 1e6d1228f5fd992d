"""How many floating point operations the mathematics of a model needs: its matrix products and convolutions.

A multiply-add is two operations. Recomputation, padding, norms, softmax and the causal half of attention that is
computed for nothing or could be left out are not considered: attention counts in full, as in published tables
(open_clip's docs/model_profile.csv), and a backward pass costs twice its forward pass.
"""

from itertools import pairwise

from clip_jax.losses import LOSSES
from clip_jax.models import CLIPConfig, ResNetConfig, TextConfig, VisionTransformerConfig, variable_shapes
from clip_jax.models.resnet import EXPANSION
from clip_jax.training.config import RunConfig, frozen_patterns
from clip_jax.training.parameters import split
from clip_jax.training.step import patches_kept


def train_flops(run: RunConfig) -> int:
    """Of one example in a training step: both towers and its row of the similarity matrix, forward and backward.

    A tower that is frozen as a whole has no backward pass. One that is frozen in part counts in full, which is too much
    by the gradients of its frozen weights: with adapters on few kernels, by up to a third. A head takes the place of
    the text tower and the matrix.
    """
    config = run.model
    trained, _ = split(variable_shapes(config)["params"], frozen_patterns(run))
    passes = {tower: 3 if tower in trained else 1 for tower in ("visual", "text")}
    if run.cache_features:
        passes["visual"] = 0
    image, text = image_flops(config), _text(config.text, config.embed_dim)
    if run.patch_dropout:
        image -= _of_patches_left_out(config.vision, patches_kept(config.vision, run.patch_dropout))
    if LOSSES[run.loss].target == "label":
        head = _matmul(1, config.embed_dim, len(config.classes))
        return passes["visual"] * image + (1 + ("classifier" in trained) + ("visual" in trained)) * head
    similarities = 2 * run.batch_size * config.embed_dim
    products = 1 + sum(tower in trained for tower in passes)  # the matrix, and the gradients of those that have one
    return passes["visual"] * image + passes["text"] * text + products * similarities


def forward_flops(config: CLIPConfig) -> int:
    """Of encoding one image and one text."""
    return image_flops(config) + _text(config.text, config.embed_dim)


def image_flops(config: CLIPConfig) -> int:
    """Of encoding one image."""
    return _IMAGE_TOWERS[type(config.vision)](config.vision, config.embed_dim)


def _vision_transformer(config: VisionTransformerConfig, embed_dim: int) -> int:
    patches = config.tokens - 1
    embedding = _matmul(patches, 3 * config.patch_size**2, config.width)
    blocks = config.layers * _block(config.tokens, config.width, config.mlp_width)
    return embedding + blocks + _matmul(1, config.width, embed_dim)


def _of_patches_left_out(config: VisionTransformerConfig, kept: int) -> int:
    """What blocks do not compute that see so many patches only; all are embedded first."""
    whole, rest = (_block(tokens, config.width, config.mlp_width) for tokens in (config.tokens, kept + 1))
    return config.layers * (whole - rest)


def _text(config: TextConfig, embed_dim: int) -> int:
    blocks = config.layers * _block(config.context_length, config.width, config.mlp_width)
    return blocks + _matmul(1, config.width, embed_dim)


def _block(tokens: int, width: int, mlp_width: int) -> int:
    projections = 4 * _matmul(tokens, width, width)
    attention = 2 * _matmul(tokens, width, tokens)
    return projections + attention + 2 * _matmul(tokens, width, mlp_width)


def _resnet(config: ResNetConfig, embed_dim: int) -> int:
    width, side = config.width, config.image_resolution // 2
    stem = (3, width // 2, width // 2, width)
    total = sum(_conv(side, 3, *channels) for channels in pairwise(stem))
    inplanes, side = width, side // 2
    for stage, blocks in enumerate(config.layers):
        planes = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            total += _bottleneck(side, inplanes, planes, stride)
            inplanes, side = planes * EXPANSION, side // stride
    return total + _attention_pool(config.tokens, config.output_width, embed_dim)


def _bottleneck(side: int, inplanes: int, planes: int, stride: int) -> int:
    outplanes, after = planes * EXPANSION, side // stride
    residual = _conv(side, 1, inplanes, planes) + _conv(side, 3, planes, planes) + _conv(after, 1, planes, outplanes)
    return residual + (_conv(after, 1, inplanes, outplanes) if stride > 1 or inplanes != outplanes else 0)


def _attention_pool(tokens: int, width: int, embed_dim: int) -> int:
    projections = _matmul(1, width, width) + 2 * _matmul(tokens, width, width)
    return projections + 2 * _matmul(1, width, tokens) + _matmul(1, width, embed_dim)


def _conv(side: int, kernel: int, channels_in: int, channels_out: int) -> int:
    """A square convolution with an output of side x side, padding counted as data."""
    return _matmul(side**2, kernel**2 * channels_in, channels_out)


def _matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


_IMAGE_TOWERS = {VisionTransformerConfig: _vision_transformer, ResNetConfig: _resnet}
