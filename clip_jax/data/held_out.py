"""Which images of a folder are held out of training, to judge by: a function of their names and of nothing else.

Neither the place of the folder nor the order in which a file system lists it changes anything, so everybody who has
the images has the same two parts. Images with the same bytes are in the same part: a copy of what was learned
proves nothing.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from clip_jax.data.checked import read_file
from clip_jax.errors import UserError


@dataclass(frozen=True)
class Division:
    """The two parts of a folder.

    Attributes:
      train: paths of the images to train on.
      held_out: paths of those to judge by.
      copies: how many images are copies of another one, byte by byte.
    """

    train: frozenset[str]
    held_out: frozenset[str]
    copies: int

    def paths_below(self, path: str) -> dict[str, list[str]]:
        """The images of both parts, by their paths below the folder, as WORKDIR/held_out.json has them."""
        parts = {"train": self.train, "held_out": self.held_out}
        return {part: sorted(os.path.relpath(image, path) for image in images) for part, images in parts.items()}


def divide(path: str, classes: Mapping[str, str], share: float) -> Division:
    """Hold out a share of the images of each class, rounded, but at least one; and leave at least one.

    Copies count once, where their first one is.

    Args:
      path: of the folder.
      classes: from the path of each image to the name of its class; to "" where there are no classes.
      share: of what is held out, above 0 and below 1.

    Raises:
      UserError: a class has too few different images to be divided.
    """
    ranks = {image: _rank(os.path.relpath(image, path)) for image in classes}
    of_class: dict[str, list[list[str]]] = {name: [] for name in sorted({*classes.values()})}
    for copies in _same_bytes(sorted(classes, key=ranks.get)):
        of_class[classes[copies[0]]].append(copies)
    held_out: set[str] = set()
    for name, images in of_class.items():
        if len(images) < 2:
            raise UserError(_too_few(path, name, len(images), share))
        count = min(max(round(share * len(images)), 1), len(images) - 1)
        held_out.update(image for copies in images[:count] for image in copies)
    copies = len(classes) - sum(map(len, of_class.values()))
    return Division(frozenset(classes.keys() - held_out), frozenset(held_out), copies)


def in_both(images: Iterable[str], others: Iterable[str]) -> str | None:
    """One of `images` that is among the others as well, itself or a copy of it byte by byte; None if none is."""
    images, others = set(images), set(others)
    for copies in _same_bytes(sorted(images | others)):
        if not others.isdisjoint(copies) and (found := next((copy for copy in copies if copy in images), None)):
            return found
    return None


def _rank(name: str) -> bytes:
    """What decides where an image comes: of its name, with slashes on every system."""
    return hashlib.sha256(name.replace(os.sep, "/").encode(errors="surrogateescape")).digest()


def _same_bytes(images: Iterable[str]) -> Iterator[list[str]]:
    """The images in their order, each with its copies after it. Only files of the same size are read."""
    of_size: dict[object, list[str]] = {}
    for image in images:
        of_size.setdefault(_size(image), []).append(image)
    first_of: dict[str, list[str]] = {}
    for same_size in of_size.values():
        alike: dict[bytes, list[str]] = {}
        for image in same_size:
            content = b"" if len(same_size) == 1 else hashlib.sha256(read_file(image, "image")).digest()
            alike.setdefault(content, []).append(image)
        first_of.update({copies[0]: copies for copies in alike.values()})
    yield from (first_of[image] for image in images if image in first_of)


def _size(image: str) -> object:
    """In bytes; what cannot be read is like nothing else, and refused when its turn comes."""
    try:
        return os.path.getsize(image)
    except OSError:
        return image


def _too_few(path: str, name: str, images: int, share: float) -> str:
    whose = f"the class {name!r} of {path}" if name else path
    return (
        f"held_out={share:g} needs at least two different images of each class, one to train on and one to judge by, "
        f"but {whose} has {images}: add images, remove the folder, or set held_out to 0"
    )
