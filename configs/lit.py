"""LiT (arXiv 2111.07991): a trained image tower, locked, and a text tower that learns to read it from scratch.

python train.py --config lit --workdir DIR --config.data.folder.path=IMAGES
python train.py --config lit --workdir DIR --config.data.folder.path=IMAGES --config.init_from=MODEL
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """ViT-B/32 with OpenAI's image tower; 245 million pairs."""
    config = paper("ViT-B/32", learning_rate=1e-3)
    config.name = "lit"
    config.init_from = "ViT-B/32"
    config.init_fresh = ("text/*", "logit_scale")
    config.optimizer.update({"frozen": ("visual/*",), "weight_decay": 0.1, "warmup_steps": 1_800, "clip_norm": 1.0})
    config.batch_size = 4_096
    config.total_steps = 60_000
    return config
