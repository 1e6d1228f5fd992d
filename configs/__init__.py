"""One file a model, each with a `get_config()`; what they share is the paper's training recipe, here."""

from ml_collections import ConfigDict

from clip_jax.models import OPENAI_MODELS, ResNetConfig


def paper(name: str, learning_rate: float, block_tokens: int = 0) -> ConfigDict:
    """The recipe of the CLIP paper (section 2.5, tables 18 to 20) for one of OpenAI's models.

    Images and captions come from a folder (`--config.data.folder.path=...`); the paper's own data are not public.
    """
    model = OPENAI_MODELS[name]
    resnet = isinstance(model.vision, ResNetConfig)
    return ConfigDict(
        {
            "name": name,  # OpenAI's spelling; evaluate.py loads these weights when none are given
            "model": model.to_dict(),  # the architecture
            "seed": 0,  # of the first weights and of the order of the data
            "batch_size": 32_768,  # over all devices
            "total_steps": 390_625,  # 32 epochs of 400 million pairs
            "microbatches": 1,  # pieces in which a device encodes its share; raise it when memory is short
            "dtype": "bfloat16",  # of the computation; parameters are float32
            "remat": "full",  # what the backward pass recomputes: none, attention, dots or full
            "unroll": 2 if block_tokens else 1,  # Transformer blocks in one iteration of the layer loop
            "attention": "xla",  # or cudnn on NVIDIA GPUs
            "block_tokens": block_tokens,  # that a block works on at a time, chosen for TPUs; 0 (all) on GPUs
            "loss": "softmax",  # or sigmoid, with model.logit_bias
            "loss_tile": 1_024,  # rows of the similarity matrix in memory at a time
            "mesh": {
                "data": 1,  # copies of parameters and moments in a slice
                "fsdp": -1,  # devices that share one copy; -1 takes all that are left
                "tensor": 1,  # devices that share heads and MLP widths
                "rules": {},  # logical axis -> mesh axis, over those of clip_jax/parallel.py
            },
            "optimizer": {
                "learning_rate": learning_rate,  # peak
                "weight_decay": 0.2,  # decoupled; not on gains and biases
                "b1": 0.9,  # decay of the first moment
                "b2": 0.999 if resnet else 0.98,  # decay of the second moment
                "eps": 1e-8 if resnet else 1e-6,  # added to the second moment's root
                "warmup_steps": 2_000,  # linear warm-up
                "mu_dtype": "float32",  # of the first moment; bfloat16 saves memory
            },
            "log_every": 100,  # steps
            "eval_every": 10_000,  # steps
            "checkpoint_every": 5_000,  # steps
            "data": {"folder": {"path": "", "weight": 1.0}},  # source -> its fields
            "data_dir": "",  # where prepared data sets are; empty means TFDS's own default
            "eval_datasets": ("imagenet_v2",),  # what evaluation measures
        }
    )
