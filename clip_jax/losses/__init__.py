"""The contrastive losses, each as one object: its definition, its ring over the mesh, its parameters' start and bounds.

A loss of one's own is one more file and one more entry of `LOSSES`.
"""

from clip_jax.losses.captions import REPEATED_CAPTIONS, Captions, captions_of
from clip_jax.losses.loss import Loss
from clip_jax.losses.sigmoid import SIGMOID, sigmoid_loss
from clip_jax.losses.softmax import SOFTMAX, softmax_loss

# What `config.loss` can name.
LOSSES: dict[str, Loss] = {"softmax": SOFTMAX, "sigmoid": SIGMOID}

__all__ = [
    "LOSSES",
    "REPEATED_CAPTIONS",
    "SIGMOID",
    "SOFTMAX",
    "Captions",
    "Loss",
    "captions_of",
    "sigmoid_loss",
    "softmax_loss",
]
