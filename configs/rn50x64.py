"""RN50x64: a ResNet-50 scaled 64 times; the paper reports 73.6% zero-shot on ImageNet.

python train.py --config rn50x64 --workdir DIR --config.data.folder.path=IMAGES
python evaluate.py --config rn50x64
"""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The paper's recipe."""
    config = paper("RN50x64", learning_rate=3.6e-4)
    config.microbatches = 16  # of 32,768 examples on 256 chips of 16 GiB
    return config
