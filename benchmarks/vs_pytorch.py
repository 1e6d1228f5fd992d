"""Forward pass and train step against OpenAI's PyTorch model, in one run on one machine.

  python -m benchmarks.vs_pytorch [--models ViT-B/32 RN50] [--compile] [--output FILE.md]

Random weights, float32, the same batch, both libraries on all cores. Each round times every contestant once, in turn,
so that a machine whose speed drifts slows all of them; the figures are medians over the rounds.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from clip_jax.models import CLIP, OPENAI_MODELS, CLIPConfig
from clip_jax.parallel import MeshSizes, make_mesh
from clip_jax.training.loop import to_devices
from clip_jax.training.optimizer import OptimizerConfig, make_optimizer
from clip_jax.training.state import initial_state
from clip_jax.training.step import StepConfig, make_train_step
from clip_jax.weights.verify import openai_classes

FORWARD_BATCH, TRAIN_BATCH = 32, 16
Contestants = dict[str, Callable[[], None]]


def main() -> None:
    """Time, print a table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B/32", "RN50"], choices=list(OPENAI_MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (slow to start)")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    flags = parser.parse_args()
    rows = []
    for name in flags.models:
        config = OPENAI_MODELS[name]
        for what, batch, contestants in (
            ("image tower forward", FORWARD_BATCH, forward_contestants(config, flags.compile)),
            ("train step", TRAIN_BATCH, train_contestants(config, flags.compile)),
        ):
            seconds = race(contestants, flags.rounds)
            rows += table_rows(name, what, batch, seconds)
            print("\n".join(rows[-len(seconds) :]), flush=True)
    if flags.output:
        flags.output.write_text(header() + "\n".join(rows) + "\n")


def forward_contestants(config: CLIPConfig, with_compile: bool) -> Contestants:
    """Image features of one batch."""
    side = config.vision.image_resolution
    images = np.random.default_rng(0).normal(size=(FORWARD_BATCH, side, side, 3)).astype(np.float32)
    model = CLIP(config)
    tokens = jnp.zeros((1, config.text.context_length), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1], tokens)
    encode = jax.jit(lambda variables, images: model.apply(variables, images, method=model.encode_image))
    on_device = jnp.asarray(images)
    reference = torch_model(config).eval()
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def with_torch(tower: Callable) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                tower(channels_first)

        return run

    contestants = {
        "clip_jax": lambda: encode(variables, on_device).block_until_ready(),
        "PyTorch": with_torch(reference.visual),
    }
    if with_compile:
        contestants["PyTorch, compiled"] = with_torch(torch.compile(reference.visual))
    return contestants


def train_contestants(config: CLIPConfig, with_compile: bool) -> Contestants:
    """Both towers, the loss over the batch, gradients and AdamW with the paper's settings."""
    rng, side = np.random.default_rng(0), config.vision.image_resolution
    images = rng.integers(0, 256, (TRAIN_BATCH, side, side, 3), dtype=np.uint8)
    tokens = rng.integers(1, 49_000, (TRAIN_BATCH, config.text.context_length), dtype=np.int32)
    tokens[:, -1] = 49_407
    contestants = {"clip_jax": jax_train_step(config, images, tokens)}
    contestants["PyTorch"] = torch_train_step(config, images, tokens, compiled=False)
    if with_compile:
        contestants["PyTorch, compiled"] = torch_train_step(config, images, tokens, compiled=True)
    return contestants


def jax_train_step(config: CLIPConfig, images: np.ndarray, tokens: np.ndarray) -> Callable[[], None]:
    """The very step that train.py runs."""
    mesh = make_mesh(MeshSizes(), jax.devices()[:1])
    model, optimizer = CLIP(config), make_optimizer(OptimizerConfig(learning_rate=1e-5), 1_000_000)
    step = make_train_step(model, optimizer, StepConfig(), mesh)
    batch = to_devices({"image": images, "text": tokens}, mesh)
    state = [initial_state(model, optimizer, mesh, seed=0)]

    def run() -> None:
        state[0], metrics = step(state[0], batch)
        metrics["loss"].block_until_ready()

    return run


def torch_train_step(config: CLIPConfig, images: np.ndarray, tokens: np.ndarray, compiled: bool) -> Callable[[], None]:
    """The same step written with torch.optim.AdamW and two parameter groups."""
    model = torch_model(config).train()
    gains = [p for name, p in model.named_parameters() if p.ndim < 2 and "embedding" not in name]
    weights = [p for name, p in model.named_parameters() if p.ndim >= 2 or "embedding" in name]
    groups = [{"params": weights, "weight_decay": 0.2}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (config.image_mean, config.image_std))
    images, tokens = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
    labels = torch.arange(len(tokens))

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


def race(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after two turns to warm up."""
    for run in contestants.values():
        run()
        run()
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table_rows(model: str, what: str, batch: int, seconds: dict[str, list[float]]) -> list[str]:
    """One Markdown row a contestant: rate, and how many times as fast clip_jax is, round by round."""
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(other / ours for other, ours in zip(times, seconds["clip_jax"], strict=True))
        rows.append(f"| {model} | {what} | {batch} | {name} | {batch / statistics.median(times):.1f} | {ratio:.2f} |")
    return rows


def header() -> str:
    """What was measured, and on what."""
    cores = os.cpu_count()
    machine = f"{platform.machine()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    return (
        "# Against OpenAI's PyTorch model\n\n`python -m benchmarks.vs_pytorch --compile`: "
        f"float32, {machine}; jax {jax.__version__}, torch {torch.__version__}.\n\n"
        "| model | what | batch | contestant | examples/s | clip_jax is faster by |\n|---|---|---:|---|---:|---:|\n"
    )


if __name__ == "__main__":
    main()
