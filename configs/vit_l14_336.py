"""ViT-L/14@336px: ViT-L/14 trained for one more epoch at 336 pixels; the paper reports 76.2% zero-shot on ImageNet.

python train.py --config vit_l14_336 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config vit_l14_336
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe for the extra epoch."""
    config = paper("ViT-L/14@336px", learning_rate=2e-5, block_tokens=1_664)
    config.total_steps = 12_207  # one epoch, on top of ViT-L/14
    return config
