"""How long a run takes, from how fast images are encoded."""

import dataclasses

import pytest

from clip_jax.models import OPENAI_MODELS, Execution
from clip_jax.planner.duration import describe, duration
from clip_jax.training.config import RunConfig

RUN = RunConfig("b32", OPENAI_MODELS["ViT-B/32"], batch_size=64, total_steps=120, eval_every=10)


def test_a_step_costs_three_times_what_encoding_its_pairs_costs():
    """open_clip's table of profiles: 14.78 GFLOPs for a pair of ViT-B/32, of which 8.82 are the image's."""
    expected = 120 * 64 * 3 * 14.78 / 8.82 / 20 + 12 * 100 / 20
    assert duration(RUN, images_per_second=20.0, examples=400, judged=100) == pytest.approx(expected, rel=0.01)
    again = dataclasses.replace(RUN, execution=Execution(remat="full"))
    assert duration(again, 20.0, 400, 0) == pytest.approx(duration(RUN, 20.0, 400, 0) * 4 / 3, rel=0.01)


def test_the_words_say_what_is_cheaper():
    words = describe(RUN, images_per_second=20.0, examples=400, judged=100)
    # Frozen: each of 400 images is encoded once, and texts are as before.
    minutes = (120 * 64 * 3 * (14.78 - 8.82) / 8.82 + 400 + 12 * 100) / 20 / 60
    assert words == (
        "about 33 min on this machine, reading and compiling aside: 120 steps of 64; cheaper: a frozen image tower "
        "(--config.optimizer.frozen='visual/*' --config.cache_features=true --config.augment.crop=center) "
        f"{minutes:.0f} min, a linear probe (evaluate.py --tasks linear_probe) 20 s"
    )
    frozen = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, frozen=("visual/*",)))
    assert describe(frozen, 2.0, 400, 100).startswith("about 3.4 h on") and "tower" not in describe(
        frozen, 2.0, 400, 100
    )
