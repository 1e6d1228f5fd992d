"""Images per second of zero-shot classification from JPEGs on disk, against the way of CLIP_benchmark.

  python -m benchmarks.evaluation [--images 2000] [--rounds 2] [--output FILE.md]

ViT-B/32 at full size with random weights, float32, on JPEGs of 500 x 375 in class folders. `clip_jax` is the task that
evaluate.py runs. `PyTorch` is OpenAI's model class as CLIP_benchmark uses it: PIL transforms, a DataLoader with a
worker for each core, batches of 64. `decoding alone` and `forward pass alone` are the two halves of clip_jax. Every
contestant has a process of its own; they take turns, each over all images; the figures are medians over the rounds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.input import photo
from benchmarks.machine import cpu
from benchmarks.race import Run, Turn, race
from clip_jax.platform import usable_cores

NAME, BATCH = "ViT-B/32", 64
CLASSES = ("cat", "cup", "dog", "hat", "key", "map", "owl", "pen", "sun", "tree")
SIZE = 500, 375


def main() -> None:
    """Write the images, let the contestants run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), flags.images)
        contestants = {
            "clip_jax": partial(ours, folder),
            "PyTorch": partial(pytorch, folder),
            "decoding alone": partial(decoding, folder),
            "forward pass alone": partial(forward, flags.images),
        }
        seconds, memory = race(contestants, flags.rounds, Turn(untimed=0, timed=1))
    text = report(flags.images, flags.rounds, seconds, memory)
    print(text)
    if flags.output:
        flags.output.write_text(text)


def write(folder: Path, count: int) -> None:
    """Class folders."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / CLASSES[number % len(CLASSES)] / f"{number:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo(*SIZE, generator))


def encoders() -> tuple[Any, Any]:
    """Ours, with random weights, and compiled."""
    import jax

    from clip_jax.evaluation.encoders import make_encoders
    from clip_jax.models import CLIP, OPENAI_MODELS, abstract_inputs
    from clip_jax.parallel import MeshConfig, make_partitioner

    model = CLIP(OPENAI_MODELS[NAME])
    shapes = abstract_inputs(model.config)
    inputs = [np.zeros(shape.shape, shape.dtype) for shape in shapes]
    made = make_encoders(model, make_partitioner(MeshConfig()))
    variables = jax.device_put(jax.jit(model.init)(jax.random.key(0), *inputs), made.partitioner.replicated)
    side = model.config.vision.image_resolution
    made.encode_images(variables, np.zeros((BATCH, side, side, 3), np.uint8))
    made.encode_tokens(variables, np.zeros((len(CLASSES), model.config.text.context_length), np.int32))
    return made, variables


def ours(folder: str) -> Run:
    """What evaluate.py does with a folder of class folders."""
    from clip_jax.evaluation.datasets import evaluation_set
    from clip_jax.evaluation.zero_shot import zero_shot

    made, variables = encoders()
    return lambda: zero_shot(made, variables, evaluation_set(folder), progress=False).metrics


def decoding(folder: str) -> Run:
    """The images alone, in the same batches by the same threads."""
    from clip_jax.data.pipeline import evaluation_batches
    from clip_jax.evaluation.datasets import evaluation_set
    from clip_jax.processing import Preprocess

    def run() -> None:
        source = evaluation_set(folder).source
        numbers = np.full(-(-len(source) // BATCH) * BATCH, -1)
        numbers[: len(source)] = np.arange(len(source))
        for _ in evaluation_batches(source, numbers.reshape(-1, BATCH), Preprocess(224)):
            pass

    return run


def forward(count: int) -> Run:
    """As many images that are in memory already."""
    from clip_jax.evaluation.division import divide_evenly

    made, variables = encoders()
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 224, 224, 3), np.uint8)
    division = divide_evenly(count, made.partitioner)
    return lambda: made.encode_images.run(variables, division, ((images, False) for _ in division.examples))


def pytorch(folder: str) -> Run:
    """`zeroshot_classification.evaluate` of CLIP_benchmark, in its own words where they matter."""
    import torch
    import torch.nn.functional as functional

    from benchmarks.vs_pytorch import torch_model
    from clip_jax import tokenize
    from clip_jax.models import OPENAI_MODELS

    model = torch_model(OPENAI_MODELS[NAME]).eval()
    tokens = torch.from_numpy(tokenize([f"a photo of a {name}." for name in CLASSES]))

    def batches() -> Iterator[tuple[Any, Any]]:
        data = ImageFolder(folder)
        return iter(torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=usable_cores()))

    def run() -> None:
        with torch.no_grad():
            classifier = functional.normalize(model.encode_text(tokens), dim=-1).T
            logits, labels = [], []
            for images, targets in batches():
                logits.append(100 * functional.normalize(model.encode_image(images), dim=-1) @ classifier)
                labels.append(targets)
        (torch.cat(logits).argmax(dim=1) == torch.cat(labels)).float().mean().item()

    with torch.no_grad():
        model.encode_image(torch.zeros(BATCH, 3, 224, 224))
    return run


class ImageFolder:
    """torchvision's data set of that name with OpenAI's transforms, which need no more than PIL and PyTorch."""

    def __init__(self, folder: str):
        names = sorted(path.name for path in Path(folder).iterdir())
        self.samples = [(path, names.index(path.parent.name)) for path in sorted(Path(folder).glob("*/*.jpg"))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch
        from PIL import Image

        from clip_jax.models.config import OPENAI_IMAGE_MEAN, OPENAI_IMAGE_STD

        path, label = self.samples[index]
        image = Image.open(path).convert("RGB")
        width, height = (int(224 * side / min(image.size)) for side in image.size)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (OPENAI_IMAGE_MEAN, OPENAI_IMAGE_STD))
        return pixels.sub_(mean).div_(deviation), label


def report(images: int, rounds: int, seconds: dict[str, list[float]], memory: dict[str, float]) -> str:
    """A table, and what the figures say of the two bars."""
    import jax
    import torch

    middle = {name: statistics.median(times) for name, times in seconds.items()}
    parts = [middle["decoding alone"], middle["forward pass alone"]]
    rows = [
        f"| {name} | {images / middle[name]:.1f} | {', '.join(f'{t:.1f}' for t in times)} | {memory[name]:.1f} |"
        for name, times in seconds.items()
    ]
    ratio = statistics.median(b / a for a, b in zip(seconds["clip_jax"], seconds["PyTorch"], strict=True))
    command = f"python -m benchmarks.evaluation --images {images} --rounds {rounds}"
    long, both = middle["clip_jax"] / max(parts), middle["clip_jax"] / sum(parts)
    lines = [
        "# Evaluation from JPEGs on disk",
        "",
        f"`{command}`: {NAME}, random weights, float32, JPEGs of",
        f"{SIZE[0]} x {SIZE[1]}, jax {jax.__version__}, torch {torch.__version__}, on {cpu()}.",
        "",
        "| contestant | images/s | seconds, round by round | peak memory, GiB |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        f"- clip_jax has {ratio:.2f} times the rate of PyTorch (the median of the rounds' ratios).",
        f"- It takes {long:.2f} times as long as the longer of decoding and forward pass, and {both:.2f} times the sum",
        "  of both. The sum is the least that is possible where each of them keeps all cores busy, as on a CPU; an",
        "  accelerator leaves the cores to decoding.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
