"""RN50x16: a ResNet-50 scaled 16 times; the paper reports 70.5% zero-shot on ImageNet.

python train.py --config rn50x16 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config rn50x16
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    return paper("RN50x16", learning_rate=4e-4)
