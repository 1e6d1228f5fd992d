"""RN101: a ResNet-101 image tower; the paper reports 62.2% zero-shot on ImageNet.

python train.py --config rn101 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config rn101
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    return paper("RN101", learning_rate=5e-4)
