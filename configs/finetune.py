"""Fine-tune a model on pictures of your own: class folders (PHOTOS/cups/1.jpg), or images with captions (1.jpg, 1.txt).

python train.py --config finetune --workdir runs/cups --config.init_from=ViT-B/32 --config.data.folder.path=PHOTOS

It holds a fifth of the images out and says how well the model did on them before, and does after.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """FLYP (arXiv 2212.00638): the loss of pre-training, with captions made of class names, at a low rate.

    docs/fine-tuning.md says where each choice comes from: "What was learned, and what was forgotten".
    """
    return ConfigDict(
        {
            "name": "finetune",
            "init_from": "ViT-B/32",
            "data": {"folder": {"path": "", "held_out": 0.2}},
            "repeated_captions": "ignored",
            "running_statistics": True,  # of a ResNet, whose BatchNorm small batches would ruin
            "remat": "full",  # a third more time, but it fits into a laptop's memory
            "augment": {"crop": "resized", "scale": (0.6, 1.0)},
            "batch_size": 64,
            "epochs": 10.0,
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 0.1, "warmup_steps": 0.1, "clip_norm": 1.0},
            "log_every": 1,
            "eval_every": 0,
            "checkpoint_every": 0,
        }
    )
