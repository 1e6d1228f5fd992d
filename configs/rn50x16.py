"""RN50x16: a ResNet-50 scaled 16 times; the paper reports 70.5% zero-shot on ImageNet.

python train.py --config rn50x16 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config rn50x16
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    config = paper("RN50x16", learning_rate=4e-4)
    config.microbatches = 4  # of 32,768 examples on 256 chips of 16 GiB
    return config
