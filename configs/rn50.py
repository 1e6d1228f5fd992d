"""RN50: a ResNet-50 image tower; the paper reports 59.6% zero-shot on ImageNet.

python train.py --config rn50 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config rn50
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    return paper("RN50", learning_rate=5e-4)
