"""ViT-B/32: the paper reports 63.2% zero-shot on ImageNet.

python train.py --config vit_b32 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config vit_b32
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    return paper("ViT-B/32", learning_rate=5e-4)
