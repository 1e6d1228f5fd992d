"""One file per model, each with a `get_config()`; what they share is the paper's training recipe, here."""

from ml_collections import ConfigDict


def paper(name: str, learning_rate: float, block_tokens: int = 0) -> ConfigDict:
    """The recipe of the CLIP paper (section 2.5, tables 18 to 20) for one of OpenAI's models, on TPU pods.

    Images and captions come from a folder (`--config.data.folder.path=...`); the paper's own data are not public.
    Fields that are not here have their defaults, which `python train.py --help_config` lists.
    """
    optimizer = {"b2": 0.999, "eps": 1e-8} if name.startswith("RN") else {}
    return ConfigDict(
        {
            "name": name,
            "model": name,
            "dtype": "bfloat16",
            "remat": "full",
            "unroll": 2 if block_tokens else 1,
            "block_tokens": block_tokens,  # chosen for TPUs; 0 on GPUs
            "mesh": {"data": 1, "fsdp": -1},
            "optimizer": {"learning_rate": learning_rate, **optimizer},
            "data": {"folder": {"path": "", "weight": 1.0}},
            "eval_datasets": ("imagenet_v2",),
        }
    )
