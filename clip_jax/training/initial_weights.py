"""The weights that a run starts from: another model's, fitted to this one's image size and context length."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig, variable_shapes
from clip_jax.options import option
from clip_jax.training.parameters import check_patterns, matches, split
from clip_jax.training.state import TrainState
from clip_jax.weights import load_variables

logger = logging.getLogger(__name__)

RESIZES = ("bicubic", "linear")
HEADS = ("zeroshot", "linear_probe")

_HEAD = ("params", "classifier")

# Makes a classifier (classes, embed_dim) from the weights that a run starts from; all hosts call it together.
StartHead = Callable[[Mapping[str, Any]], Float[np.ndarray, "classes embed_dim"]]

# What shapes do not show and a model is wrong without, by the part of it that starts fresh if this may differ.
_SETTINGS = {
    "activation": "",
    "image_mean": "visual/conv1/kernel",
    "image_std": "visual/conv1/kernel",
    "image_interpolation": "visual/conv1/kernel",
    "image_resize": "visual/conv1/kernel",
    "text.tokenizer": "text/token_embedding",
    "text.lowercase": "text/token_embedding",
}


@dataclass(frozen=True)
class InitialWeights:
    """What a fresh run takes from another model; a run that goes on reads its own checkpoint."""

    init_from: str = option("", "a model to start from, anything that clip_jax.load opens; empty for random weights")
    init_fresh: tuple[str, ...] = option((), "patterns of parameters that start fresh all the same, such as text/*")
    init_resize: str = option(
        "bicubic",
        "how position embeddings are fitted to another image size: bicubic with antialiasing as in open_clip, or "
        "linear as in big_vision",
    )
    head_from: str = option(
        "zeroshot",
        "how a head starts if init_from has none of these classes: zeroshot (the embeddings of their names times "
        "exp(logit_scale), as in WiSE-FT) or linear_probe (a logistic regression on the training images, as in LP-FT)",
    )

    def __post_init__(self):
        if self.init_resize not in RESIZES:
            raise UserError(f"init_resize must be one of {', '.join(RESIZES)}; got {self.init_resize!r}")
        if self.head_from not in HEADS:
            raise UserError(f"head_from must be one of {', '.join(HEADS)}; got {self.head_from!r}")
        if self.init_fresh and not self.init_from:
            raise UserError("init_fresh says what not to take from init_from; give init_from too")


def start_from(
    init: InitialWeights,
    config: CLIPConfig,
    state: TrainState,
    frozen: Iterable[str],
    start_head: StartHead | None = None,
) -> TrainState:
    """A fresh state with the weights of the model `init.init_from`; every host reads it, devices get their parts.

    Args:
      init: what to take from where.
      config: of the model that is trained.
      state: fresh.
      frozen: patterns of what is not trained, and so has no average and no adapters.
      start_head: makes the model's head, if it has one that `init.init_from` lacks.

    Raises:
      UserError: there is no such model, or it does not fit and nothing says that this may start fresh.
    """
    weights = fitted_weights(init, config)

    def placed(path: tuple, leaf: jax.Array) -> jax.Array:
        if path not in weights:
            return leaf
        array = np.asarray(weights[path], leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    flat = {path: placed(path, leaf) for path, leaf in flatten_dict(state.variables).items()}
    variables = unflatten_dict(flat)
    if config.classes and _HEAD not in weights:
        logger.info("a head of %d classes starts from head_from=%s", len(config.classes), init.head_from)
        weights = {_HEAD: start_head(variables)}
        variables["params"]["classifier"] = placed(_HEAD, flat[_HEAD])
    trained, _ = split(variables["params"], frozen)
    return state.replace(
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        ema=jax.tree.map(jnp.copy, trained) if state.ema else {},
        adapters=state.adapters.replace(base=jax.tree.map(jnp.copy, trained)) if state.adapters else {},
    )


def fitted_weights(init: InitialWeights, config: CLIPConfig) -> dict[tuple[str, ...], np.ndarray]:
    """What `init.init_from` has for a model, by the path of each variable; logs what was resized and what is fresh.

    Raises:
      UserError: as `start_from`.
    """
    theirs, variables = load_variables(init.init_from)
    found, wanted = flatten_dict(variables), flatten_dict(variable_shapes(config))
    names = {path: "/".join(path[1:]) for path in sorted({**wanted, **found})}
    check_patterns(init.init_fresh, names.values(), "init_fresh", "parameter of either model")
    _check_settings(init, theirs, config)
    weights, resized, fresh, misfits = {}, [], [], []
    head = _head(init, theirs, found.get(_HEAD), config)
    for path, name in names.items():
        have, want = (tree[path].shape if path in tree else None for tree in (found, wanted))
        what = f"{name} {'missing' if have is None else have} -> {'none' if want is None else want}"
        if path == _HEAD and want:
            weights |= {} if head is None else {_HEAD: head}
        elif matches(name, init.init_fresh):
            fresh.append(what)
        elif have == want:
            weights[path] = found[path]
        elif have and want and name.endswith("positional_embedding") and have[1] == want[1]:
            weights[path] = _resized(name, found[path], want[0], init.init_resize)
            resized.append(what)
        else:
            misfits.append(what)
    if config.classes and head is None and init.head_from == "zeroshot" and any(map(_of_text, fresh)):
        raise UserError(
            "a head that starts zero-shot is made of texts, so the text tower cannot start fresh: leave it out of "
            "init_fresh, or take head_from=linear_probe"
        )
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise UserError(
            f"{init.init_from} does not fit the model: {', '.join(misfits[:3])}{more}; change the model, or name in "
            "init_fresh what is to start fresh"
        )
    logger.info("starting from %s: %d arrays", init.init_from, len(weights))
    for what, arrays in (("resized", resized), ("fresh", fresh)):
        if arrays:
            logger.info("%s: %s", what, ", ".join(arrays))
    return weights


def _head(
    init: InitialWeights, theirs: CLIPConfig, classifier: np.ndarray | None, ours: CLIPConfig
) -> Float[np.ndarray, "classes embed_dim"] | None:
    """The head of the model to start from, in the order of our classes; None where a new one is to be made."""
    if classifier is None or not ours.classes or matches(_HEAD[-1], init.init_fresh):
        return None
    if odd := {*theirs.classes} ^ {*ours.classes}:
        logger.info("the head of %s has other classes (%r differs) and is left out", init.init_from, min(odd))
        return None
    return classifier[[theirs.classes.index(name) for name in ours.classes]]


def resize_grid(
    positions: Float[np.ndarray, "tokens width"], tokens: int, resize: str
) -> Float[np.ndarray, "_tokens width"]:
    """Positions of a square image in row-major order, after that of its class token, for another number of patches.

    Args:
      positions: float32.
      tokens: how many there are to be, the class token's included.
      resize: "bicubic", with antialiasing, is `resize_pos_embed` of open_clip; "linear", where corners stay corners,
        is `resample_posemb` of big_vision.
    """
    first, grid = positions[:1], positions[1:]
    old, new = math.isqrt(len(grid)), math.isqrt(tokens - 1)
    grid = grid.reshape(old, old, -1)
    if resize == "bicubic":
        grid = np.asarray(jax.image.resize(grid, (new, new, grid.shape[-1]), "bicubic", antialias=True))
    else:
        places = np.linspace(0, old - 1, new)
        weights = np.stack([np.interp(places, np.arange(old), row) for row in np.eye(old)], axis=1)
        grid = np.einsum("ia,jb,abw->ijw", weights, weights, grid).astype(positions.dtype)
    return np.concatenate([first, grid.reshape(new * new, -1)])


def resize_context(positions: Float[np.ndarray, "length width"], length: int) -> Float[np.ndarray, "_length width"]:
    """Positions of a text for another context length.

    A shorter context takes the first ones: the model is the same for texts that fit, which it would not be with
    positions squeezed together. A longer one is `resize_text_pos_embed` of open_clip: linear, without antialiasing.
    """
    if length <= len(positions):
        return positions[:length]
    return np.asarray(jax.image.resize(positions, (length, positions.shape[1]), "linear", antialias=False))


def _of_text(name: str) -> bool:
    return name.startswith("text/")


def _resized(name: str, positions: np.ndarray, tokens: int, resize: str) -> np.ndarray:
    return resize_context(positions, tokens) if _of_text(name) else resize_grid(positions, tokens, resize)


def _check_settings(init: InitialWeights, theirs: CLIPConfig, ours: CLIPConfig) -> None:
    """Refuse what shapes do not show: another activation, other pixel statistics, another tokenizer."""
    for name, part in _SETTINGS.items():
        their, our = (attrgetter(name)(config) for config in (theirs, ours))
        if their != our and not matches(part, init.init_fresh):
            text = ",".join(map(str, their)) if isinstance(their, tuple) else their
            raise UserError(
                f"{init.init_from} has {name}={their!r}, but model.{name} is {our!r}; set --config.model.{name}={text}"
            )
