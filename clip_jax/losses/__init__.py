"""The losses, each as one object: its definition over a mesh, what it reads, its parameters' start and bounds.

A loss of one's own is one more file and one more entry of `LOSSES`.
"""

from clip_jax.losses.captions import REPEATED_CAPTIONS, Captions, captions_of
from clip_jax.losses.contrastive import Contrastive
from clip_jax.losses.cross_entropy import CrossEntropy, cross_entropy_loss
from clip_jax.losses.loss import Loss
from clip_jax.losses.sigmoid import SIGMOID, sigmoid_loss
from clip_jax.losses.softmax import SOFTMAX, softmax_loss

CONTRASTIVE: dict[str, Contrastive] = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
# What `config.loss` can name.
LOSSES: dict[str, Loss] = {**CONTRASTIVE, "cross_entropy": CrossEntropy()}

__all__ = [
    "CONTRASTIVE",
    "LOSSES",
    "REPEATED_CAPTIONS",
    "SIGMOID",
    "SOFTMAX",
    "Captions",
    "Contrastive",
    "CrossEntropy",
    "Loss",
    "captions_of",
    "cross_entropy_loss",
    "sigmoid_loss",
    "softmax_loss",
]
