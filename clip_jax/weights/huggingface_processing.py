"""What transformers keeps beside a model: the image processor and the tokenizer, to and from our description.

transformers converts an image to RGB before it resizes it, OpenAI's and open_clip's code after that. So pixels of
transparent images and of those with a palette differ between transformers and everybody else, us included. Where an odd
number of pixels is cut off, its Pillow backend may cut one pixel beside where torchvision does.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.models.config import INTERPOLATIONS
from clip_jax.processing import VOCAB_SIZE, bpe
from clip_jax.weights.files import read_json, write_json

PREPROCESSOR_FILE = "preprocessor_config.json"
_PROCESSOR_FILE = "processor_config.json"  # of transformers 5; holds the image processor, or nothing of interest
_TOKENIZER_FILE = "tokenizer_config.json"

_IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_RESCALE_FACTOR = 1 / 255
_ONLY = {  # settings of the image processor with values that mean what our preprocessing does
    "image_processor_type": _IMAGE_PROCESSORS,
    "feature_extractor_type": _IMAGE_PROCESSORS,
    "do_resize": (True,),
    "do_rescale": (True,),
    "rescale_factor": (_RESCALE_FACTOR,),
    "do_convert_rgb": (True, False, None),  # without it, transformers takes RGB images alone
    "data_format": ("channels_first",),
}
_READ = {"size", "crop_size", "do_center_crop", "resample", "do_normalize", "image_mean", "image_std"}
_WITHOUT_MEANING = {"processor_class", "_valid_processor_keys", "auto_map"}

_SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}


def read(folder: Path, config: CLIPConfig) -> CLIPConfig:
    """`config` with the image processing and the tokenizer of a folder; what it is silent about stays OpenAI's.

    Raises:
      UserError: unreadable files, or image processing that our description cannot express.
    """
    text = dataclasses.replace(config.text, **_tokenizer(folder, config.text.vocab_size))
    path, values = _image_processor(folder)
    processing = image_processing(values, config.vision.image_resolution, str(path))
    try:
        return dataclasses.replace(config, text=text, **processing)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {error}") from error


def write(folder: Path, config: CLIPConfig) -> None:
    """Write the image processor, and OpenAI's tokenizer if the model has its whole vocabulary."""
    write_json(folder / PREPROCESSOR_FILE, image_processor_json(config))
    if config.text.vocab_size == VOCAB_SIZE:
        names = bpe.vocabulary().names
        merges = [f"{names[left]} {names[right]}\n" for left, right in bpe.vocabulary().merges]
        write_json(folder / "vocab.json", {name: i for i, name in enumerate(names)})
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(merges), encoding="utf-8")
        write_json(folder / "special_tokens_map.json", _SPECIAL_TOKENS)
        settings = {"tokenizer_class": _TOKENIZERS[0], "model_max_length": config.text.context_length}
        write_json(folder / _TOKENIZER_FILE, settings | _SPECIAL_TOKENS)


def image_processing(values: Mapping[str, Any], resolution: int, origin: str) -> dict[str, Any]:
    """The fields of CLIPConfig that say what a CLIPImageProcessor does.

    Args:
      values: its settings; sizes that they do not name are those of the model.
      resolution: of the images that the model reads.
      origin: names the file in errors.

    Raises:
      UserError: a setting that CLIPConfig cannot express.
    """
    for name, value in values.items():
        if name not in _READ | _WITHOUT_MEANING:
            check_only(name, value, _ONLY.get(name, (None, False)), origin)
    resize, side = _resize(values.get("size", resolution), origin)
    if values.get("do_center_crop", True):
        crop = values.get("crop_size", resolution)
        check_only("crop_size", crop, (resolution, {"height": resolution, "width": resolution}), origin)
    elif (resize, side) != ("squash", resolution):
        raise UserError(f"{origin}: do_center_crop is False, but size {values.get('size')!r} does not give a square")
    if side < resolution:
        raise UserError(f"{origin}: size is {values['size']!r}, smaller than the {resolution} pixels that are cropped")
    resample = values.get("resample", INTERPOLATIONS.index("bicubic"))
    check_only("resample", resample, tuple(range(len(INTERPOLATIONS))), origin)
    fields = {
        "image_interpolation": INTERPOLATIONS[int(resample)],
        "image_resize": resize,
        "image_resize_to": side,
    }
    if not values.get("do_normalize", True):
        return fields | {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    statistics = {name: values[name] for name in ("image_mean", "image_std") if name in values}
    return fields | {name: tuple(value) if isinstance(value, list) else value for name, value in statistics.items()}


def image_processor_json(config: CLIPConfig) -> dict[str, Any]:
    """Inverse of `image_processing`."""
    resolution = config.vision.image_resolution
    side = config.image_resize_to or resolution
    return {
        "image_processor_type": _IMAGE_PROCESSORS[0],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if config.image_resize == "squash" else {"shortest_edge": side},
        "resample": INTERPOLATIONS.index(config.image_interpolation),
        "do_center_crop": True,
        "crop_size": {"height": resolution, "width": resolution},
        "do_rescale": True,
        "rescale_factor": _RESCALE_FACTOR,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def check_only(what: str, found: Any, allowed: tuple, origin: str) -> None:
    """Refuse a setting that is none of the values that can be expressed."""
    if found not in allowed:
        raise UserError(f"{origin}: {what} is {found!r}, this architecture has {' or '.join(map(repr, allowed))}")


def _resize(size: Any, origin: str) -> tuple[str, int]:
    """(image_resize, the length that the resized sides get)."""
    sizes = size if isinstance(size, dict) else {"shortest_edge": size}
    match {name: value for name, value in sizes.items() if value is not None}:
        case {"shortest_edge": int(side), **rest} if not rest:
            return "shortest", side
        case {"height": int(side), "width": int(width), **rest} if side == width and not rest:
            return "squash", side
    raise UserError(f"{origin}: size is {size!r}, expected one shortest_edge, or a height and an equal width")


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(file, settings), found where transformers looks for them."""
    path = folder / _PROCESSOR_FILE
    nested = read_json(path).get("image_processor") if path.is_file() else None
    if isinstance(nested, dict):
        return path, nested
    path = folder / PREPROCESSOR_FILE
    return path, read_json(path) if path.is_file() else {}


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The fields of TextConfig that say how texts are tokenised; OpenAI's where the folder holds no tokenizer.

    Another tokenizer gets a name that `make_tokenizer` does not know: images and token ids can be encoded all the same.
    """
    path = folder / _TOKENIZER_FILE
    settings = read_json(path) if path.is_file() else {}
    name = settings.get("tokenizer_class") or _TOKENIZERS[0]
    if name not in _TOKENIZERS:
        return {"tokenizer": str(name)}
    # CLIPTokenizer of transformers lower-cases in any case; whoever asks for the contrary expects what it does not do.
    check_only("do_lower_case", settings.get("do_lower_case", True), (True,), str(path))
    vocabulary = _vocabulary(folder)
    if vocabulary is not None and vocabulary != {name: i for i, name in enumerate(bpe.vocabulary().names)}:
        return {"tokenizer": f"{name} of {len(vocabulary)} entries"}
    if vocabulary is None and vocab_size > bpe.VOCAB_SIZE:
        return {"tokenizer": f"an unknown one of {vocab_size} entries"}
    return {"tokenizer": "openai"}


def _vocabulary(folder: Path) -> dict[str, Any] | None:
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    if (folder / "tokenizer.json").is_file():
        match read_json(folder / "tokenizer.json"):
            case {"model": {"vocab": dict(vocabulary)}}:
                return vocabulary
    return None
