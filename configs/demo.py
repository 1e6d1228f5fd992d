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
                "activation": "quick_gelu",
                "logit_bias": False,  # only the sigmoid loss has one
                "image_mean": (0.48145466, 0.4578275, 0.40821073),  # of the pixels that the model sees, by channel
                "image_std": (0.26862954, 0.26130258, 0.27577711),
                "vision": {
                    "type": "vit",
                    "image_resolution": 32,  # pixels
                    "patch_size": 8,  # pixels
                    "width": 128,
                    "layers": 4,
                    "heads": 4,
                    "mlp_width": 512,
                },
                "text": {
                    "width": 64,
                    "heads": 2,
                    "mlp_width": 256,
                    "layers": 2,
                    "context_length": 24,  # tokens, start and end included
                    "vocab_size": 49_408,
                },
            },
            "seed": 0,  # of the first weights and of the order of the data
            "batch_size": 128,  # over all devices
            "total_steps": 1_200,
            "microbatches": 1,  # pieces in which a device encodes its share
            "dtype": "float32",  # of the computation
            "remat": "none",  # what the backward pass recomputes
            "unroll": 4,  # Transformer blocks in one iteration of the layer loop
            "attention": "xla",
            "block_tokens": 0,
            "loss": "softmax",  # or sigmoid, with model.logit_bias
            "loss_tile": 128,  # rows of the similarity matrix in memory at a time
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "rules": {}},  # devices along each axis; -1 takes all left
            "optimizer": {
                "learning_rate": 2e-3,  # peak
                "weight_decay": 0.1,  # decoupled; not on gains and biases
                "b1": 0.9,  # decay of the first moment
                "b2": 0.98,  # decay of the second moment
                "eps": 1e-6,  # added to the second moment's root
                "warmup_steps": 50,  # linear warm-up
                "mu_dtype": "float32",  # of the first moment
            },
            "log_every": 10,  # steps
            "eval_every": 300,  # steps
            "checkpoint_every": 300,  # steps
            "data": {"shapes": {"weight": 3.0}, "digits": {"weight": 1.0}},  # source -> its fields
            "data_dir": "",  # where prepared data sets are; empty means TFDS's own default
            "eval_datasets": ("shapes", "digits"),  # what evaluation measures
        }
    )
