"""ViT-L/14: the paper reports 75.3% zero-shot on ImageNet.

python train.py --config vit_l14 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config vit_l14
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    return paper("ViT-L/14", learning_rate=4e-4, block_tokens=2_560)
