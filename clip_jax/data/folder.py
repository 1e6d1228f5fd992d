"""`folder`: images on disk, with captions in text files beside them, or with one sub-folder for each class."""

import os
from collections.abc import Iterator
from pathlib import Path

from clip_jax.data.example import Example
from clip_jax.errors import UserError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class CaptionedFolder:
    """Images anywhere below a folder; `name.txt` beside `name.jpg` holds its captions, one a line."""

    def __init__(self, path: str):
        self.name = path
        self._images = _find_images(path)
        texts = {file.with_suffix(""): file for file in _files(path) if file.suffix.lower() == ".txt"}
        missing = [image for image in self._images if image.with_suffix("") not in texts]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self._images)} images have no caption file: "
                f"{missing[0]} needs {missing[0].with_suffix('.txt').name} beside it"
            )
        self._texts = [texts[image.with_suffix("")] for image in self._images]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return Example(
            self._images[index].read_bytes(), _read_captions(self._texts[index]), key=str(self._images[index])
        )


class LabelledFolder:
    """Images below one sub-folder for each class; the sub-folders in order of their names are the classes.

    Attributes:
      class_names: the names of the sub-folders, with spaces for underscores.
    """

    def __init__(self, path: str):
        root = Path(path)
        images = [image for image in _find_images(path) if image.parent != root]
        folders = sorted({image.relative_to(root).parts[0] for image in images})
        if not folders:
            raise UserError(f"{path} has images but no class sub-folders: expected {path}/CLASS/IMAGE")
        self.class_names = tuple(folder.replace("_", " ") for folder in folders)
        self.name = path
        self._images = images
        self._labels = [folders.index(image.relative_to(root).parts[0]) for image in images]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        image = self._images[index]
        return Example(image.read_bytes(), label=self._labels[index], key=str(image))


def _find_images(path: str) -> list[Path]:
    """All images below a folder, sorted by name, so that their order is the same on every host."""
    if not os.path.isdir(path):
        raise UserError(f"expected a folder of images, but {path} is not a folder")
    images = sorted(file for file in _files(path) if file.suffix.lower() in _SUFFIXES)
    if not images:
        raise UserError(f"{path} holds no image: expected files that end in {', '.join(_SUFFIXES)}")
    return images


def _files(path: str) -> Iterator[Path]:
    """Every file below a folder, but hidden ones (macOS leaves a `._x.jpg` beside `x.jpg`)."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif entry.is_file():
                yield Path(entry.path)


def _read_captions(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise UserError(f"{path} is empty: expected at least one line with a caption")
    return captions
