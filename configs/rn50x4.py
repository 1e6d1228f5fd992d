"""RN50x4: a ResNet-50 scaled 4 times; the paper reports 65.8% zero-shot on ImageNet.

python train.py --config rn50x4 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config rn50x4
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    return paper("RN50x4", learning_rate=5e-4)
