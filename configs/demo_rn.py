"""The demo with a ModifiedResNet image tower.

python train.py --config demo_rn --workdir runs/demo_rn
python evaluate.py --config demo_rn --weights runs/demo_rn --report runs/demo_rn/report.html
"""

from ml_collections import ConfigDict

from configs import demo


def get_config() -> ConfigDict:
    """The demo's recipe, with the settings of the paper's ResNets where they differ."""
    config = demo.get_config()
    config.name = "demo_rn"
    config.model.vision = ConfigDict(
        {
            "type": "resnet",
            "image_resolution": 32,  # pixels
            "width": 16,  # channels of the first stage; the last has 32 times as many
            "layers": (1, 1, 1, 1),  # blocks of each stage
            "heads": 8,  # of the attention pool
        }
    )
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    return config
