"""A small CLIP with a ViT image tower, for a laptop's CPU: `make demo` trains and evaluates it in minutes.

python train.py --config demo --workdir runs/demo
python evaluate.py --config demo --weights runs/demo --report runs/demo/report.html
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The demo: coloured shapes and handwritten digits, learned together."""
    return ConfigDict(
        {
            "name": "demo",
            "model": {
                "embed_dim": 64,
                "vision": {
                    "type": "vit",
                    "image_resolution": 32,
                    "patch_size": 8,
                    "width": 128,
                    "layers": 4,
                    "heads": 4,
                    "mlp_width": 512,
                },
                "text": {"width": 64, "heads": 2, "mlp_width": 256, "layers": 2, "context_length": 24},
            },
            "data": {"shapes": {"weight": 2.0}, "digits": {"weight": 1.0}},
            "augment": {"crop": "resized", "scale": (0.75, 1.0)},  # 1,442 digits, seen 35 times each
            "eval_datasets": ("shapes", "digits"),
            "batch_size": 128,
            "total_steps": 1_200,
            "unroll": 4,
            "optimizer": {"learning_rate": 2e-3, "weight_decay": 1.0, "warmup_steps": 50},
            "log_every": 10,
            "eval_every": 300,
            "checkpoint_every": 300,
        }
    )
