"""ViT-B/16: the paper reports 68.6% zero-shot on ImageNet.

python train.py --config vit_b16 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config vit_b16
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    return paper("ViT-B/16", learning_rate=5e-4, block_tokens=3_328)
