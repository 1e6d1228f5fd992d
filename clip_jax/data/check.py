"""Reading all data once, before a run: what is damaged, where, and why."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from tqdm import tqdm

from clip_jax.data.damage import Damaged, counted, image_damage, naming, of_example
from clip_jax.data.example import Example, Source, where
from clip_jax.data.targets import Target
from clip_jax.platform import usable_cores
from clip_jax.processing.images import open_image

_CHUNK = 256  # samples that one thread reads in one go
_EXAMPLES = 5  # of each reason


@dataclass
class Checked:
    """What the check of one source found.

    Attributes:
      source: its name.
      samples: how many were read.
      damage: counted by reason, samples and parts of shards.
      examples: a few messages of each reason.
    """

    source: str
    samples: int
    damage: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, error: Damaged) -> None:
        """Count one, and keep its message if there are few."""
        self.damage[error.reason] += 1
        examples = self.examples.setdefault(error.reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(str(error))

    def lines(self) -> list[str]:
        """The report."""
        if not self.damage:
            return [f"{self.source}: {self.samples} samples, all sound"]
        heading = f"{self.source}: {self.samples} samples; damaged: {counted(self.damage)}"
        return [heading, *(f"  {reason}: {text}" for reason, texts in self.examples.items() for text in texts)]


def check(sources: Sequence[Source], target: Target) -> list[Checked]:
    """Read and decode every image of every source, and look at what training reads besides."""
    return [_check(source, target) for source in sources]


def _check(source: Source, target: Target) -> Checked:
    found = Checked(source.name, len(source))
    for error in getattr(source, "damage", ()):
        found.add(error)
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    bar = tqdm(total=len(source), desc=f"checking {source.name}", unit="sample", leave=False)
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        for chunk, errors in zip(chunks, pool.map(partial(_errors, source, target), chunks), strict=True):
            for error in errors:
                found.add(error)
            bar.update(len(chunk))
    return found


def _errors(source: Source, target: Target, indices: range) -> list[Damaged]:
    errors = []
    for index in indices:
        try:
            with naming(where(source, index)):
                _read(source, source[index], target)
        except Damaged as error:
            errors.append(error)
    return errors


def _read(source: Source, example: Example, target: Target) -> None:
    with of_example(example.key):
        with image_damage():
            open_image(example.image)
        target.words(source, example)
