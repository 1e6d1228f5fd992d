"""Forward pass and train step against OpenAI's PyTorch model, in one run on one machine.

  python -m benchmarks.vs_pytorch [--models ViT-B/32 RN50] [--compile] [--output FILE.md]

Random weights, float32, the same batch, both libraries on all cores. Every contestant has a process of its own, as it
would for a user. They take turns while the others wait, so that a machine whose speed drifts slows all of them; a turn
is one run that is not timed and two that are, because memory that lay idle costs the first one extra. The figures are
medians over the rounds.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.machine import cpu
from benchmarks.race import Run, Turn, race
from clip_jax.models import CLIP, OPENAI_MODELS, CLIPConfig, ResNetConfig
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.training.loop import to_devices
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import Training, initial_state
from clip_jax.training.step import make_train_step
from clip_jax.weights.verify import openai_classes

FORWARD_BATCH, TRAIN_BATCH = 32, 16
TURN = Turn(untimed=1, timed=2)


def main() -> None:
    """Time, print a table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B/32", "RN50"], choices=list(OPENAI_MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (slow to start)")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    flags = parser.parse_args()
    head = header(flags.compile)
    print(head, end="", flush=True)
    rows = []
    for name in flags.models:
        for what, batch, ours, theirs in (
            ("image tower forward", FORWARD_BATCH, jax_forward, torch_forward),
            ("train step", TRAIN_BATCH, jax_train_step, torch_train_step),
        ):
            contestants = {"clip_jax": partial(ours, name)}
            for label, options in torch_variants(OPENAI_MODELS[name], flags.compile).items():
                contestants[label] = partial(theirs, name, **options)
            seconds, memory = race(contestants, flags.rounds, TURN)
            rows += table_rows(name, what, batch, seconds, memory)
            print("\n".join(rows[-len(seconds) :]), flush=True)
    if flags.output:
        flags.output.write_text(head + "\n".join(rows) + "\n")


def torch_variants(config: CLIPConfig, with_compile: bool) -> dict[str, dict[str, bool]]:
    """The ways to run the PyTorch model: eager or compiled, and for convolutions channels first or last."""
    variants = {"PyTorch": {"compiled": False, "channels_last": False}}
    if isinstance(config.vision, ResNetConfig):
        variants["PyTorch, channels last"] = {"compiled": False, "channels_last": True}
    if with_compile:
        variants |= {f"{label}, compiled": {**options, "compiled": True} for label, options in variants.items()}
    return variants


def forward_batch(config: CLIPConfig) -> np.ndarray:
    """Normalised images, (FORWARD_BATCH, R, R, 3)."""
    side = config.vision.image_resolution
    return np.random.default_rng(0).normal(size=(FORWARD_BATCH, side, side, 3)).astype(np.float32)


def train_batch(config: CLIPConfig) -> tuple[np.ndarray, np.ndarray]:
    """Images as bytes and tokens that end in end-of-text."""
    rng, side = np.random.default_rng(0), config.vision.image_resolution
    images = rng.integers(0, 256, (TRAIN_BATCH, side, side, 3), dtype=np.uint8)
    tokens = rng.integers(1, 49_000, (TRAIN_BATCH, config.text.context_length), dtype=np.int32)
    tokens[:, -1] = 49_407
    return images, tokens


def jax_forward(name: str) -> Run:
    """Image features of one batch."""
    config = OPENAI_MODELS[name]
    model, images = CLIP(config), jnp.asarray(forward_batch(config))
    tokens = jnp.zeros((1, config.text.context_length), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1], tokens)
    encode = jax.jit(lambda variables, images: model.apply(variables, images, method=model.encode_image))
    return lambda: encode(variables, images).block_until_ready()


def torch_forward(name: str, compiled: bool, channels_last: bool) -> Run:
    """The same by OpenAI's class."""
    config = OPENAI_MODELS[name]
    tower = torch_model(config).eval().visual
    images = torch.from_numpy(forward_batch(config)).permute(0, 3, 1, 2)  # channels last in memory
    if channels_last:
        tower = tower.to(memory_format=torch.channels_last)
    else:
        images = images.contiguous()
    tower = torch.compile(tower) if compiled else tower

    def run() -> None:
        with torch.inference_mode():
            tower(images)

    return run


def jax_train_step(name: str) -> Run:
    """The very step that train.py runs: both towers, the loss over the batch, gradients, AdamW."""
    config = OPENAI_MODELS[name]
    images, tokens = train_batch(config)
    partitioner = make_partitioner(MeshConfig(), jax.devices()[:1])
    model, optimizer = CLIP(config), make_optimizer(OptimizerConfig(learning_rate=1e-5), 1_000_000)
    training = Training(model, optimizer, partitioner)
    step = make_train_step(training)
    batch = to_devices({"image": images, "text": tokens}, partitioner)
    state = [initial_state(training, seed=0)]

    def run() -> None:
        state[0], _ = step(state[0], batch)
        jax.block_until_ready(state[0])

    return run


def torch_train_step(name: str, compiled: bool, channels_last: bool) -> Run:
    """The same step written with torch.optim.AdamW and two parameter groups."""
    config = OPENAI_MODELS[name]
    images, tokens = (torch.from_numpy(x) for x in train_batch(config))
    images, tokens, labels = images.permute(0, 3, 1, 2), tokens.long(), torch.arange(TRAIN_BATCH)
    model = torch_model(config).train()
    if channels_last:
        model.visual.to(memory_format=torch.channels_last)
    else:
        images = images.contiguous()
    gains = [p for name, p in model.named_parameters() if p.ndim < 2 and "embedding" not in name]
    weights = [p for name, p in model.named_parameters() if p.ndim >= 2 or "embedding" in name]
    groups = [{"params": weights, "weight_decay": 0.2}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (config.image_mean, config.image_std))

    def loss_of(images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits, transposed = model((images.float() / 255 - mean) / std, tokens)
        entropy = torch.nn.functional.cross_entropy
        return (entropy(logits, labels) + entropy(transposed, labels)) / 2

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def run() -> None:
        optimizer.zero_grad()
        loss_of(images, tokens).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, float(np.log(100)))

    return run


def torch_model(config: CLIPConfig) -> torch.nn.Module:
    """OpenAI's class, float32, with its own first weights."""
    vision, text, classes = config.vision, config.text, openai_classes()
    sys.modules.setdefault(classes.__name__, classes)  # torch.compile looks its source up there
    return classes.CLIP(
        config.embed_dim,
        vision.image_resolution,
        vision.layers,
        vision.width,
        getattr(vision, "patch_size", None),
        text.context_length,
        text.vocab_size,
        text.width,
        text.heads,
        text.layers,
    )


def table_rows(
    model: str, what: str, batch: int, seconds: dict[str, list[float]], memory: dict[str, float]
) -> list[str]:
    """One Markdown row a contestant: rate, and how many times as fast clip_jax is, round by round."""
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(other / ours for other, ours in zip(times, seconds["clip_jax"], strict=True))
        rate = batch / statistics.median(times)
        rows.append(f"| {model} | {what} | {batch} | {name} | {rate:.1f} | {ratio:.2f} | {memory[name]:.1f} |")
    return rows


def header(with_compile: bool) -> str:
    """What was measured, and on what."""
    command = "python -m benchmarks.vs_pytorch" + with_compile * " --compile"
    return (
        f"# Against OpenAI's PyTorch model\n\n`{command}`: float32, jax {jax.__version__}, torch {torch.__version__}, "
        f"on {cpu()}.\n\n"
        "| model | what | batch | contestant | examples/s | clip_jax is faster by | peak memory, GiB |\n"
        "|---|---|---:|---|---:|---:|---:|\n"
    )


if __name__ == "__main__":
    main()
