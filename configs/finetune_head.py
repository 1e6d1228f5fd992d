"""Fine-tune a model on class folders with a head that starts as a linear probe (LP-FT, arXiv 2202.10054).

python train.py --config finetune_head --workdir runs/cups --config.init_from=ViT-B/32 --config.data.folder.path=PHOTOS

In our own table (docs/fine-tuning.md) it learned most and forgot least. It classifies among its classes only; for
captions, or classes that are named later, take `finetune`.
"""

from ml_collections import ConfigDict

from configs import finetune


def get_config() -> ConfigDict:
    """`finetune`, with cross entropy over the classes instead of a loss over captions."""
    config = finetune.get_config()
    config.update({"name": "finetune_head", "loss": "cross_entropy", "head_from": "linear_probe"})
    return config
