"""`folder`: images on disk, with captions in text files beside them, or with one sub-folder for each class."""

from pathlib import Path

from clip_jax.data.example import Example
from clip_jax.errors import UserError
from clip_jax.processing.images import open_image

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class CaptionedFolder:
    """Images anywhere below a folder; `name.txt` beside `name.jpg` holds its captions, one a line."""

    def __init__(self, path: str):
        self.name = path
        self._images = _find_images(Path(path))
        texts = set(Path(path).rglob("*.txt"))
        missing = [image for image in self._images if image.with_suffix(".txt") not in texts]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self._images)} images have no caption file: "
                f"{missing[0]} needs {missing[0].with_suffix('.txt').name} beside it"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        path = self._images[index]
        return Example(open_image(path), _read_captions(path.with_suffix(".txt")))


class LabelledFolder:
    """Images below one sub-folder for each class; the sub-folders in order of their names are the classes.

    Attributes:
        class_names: The names of the sub-folders, with spaces for underscores.
    """

    def __init__(self, path: str):
        root = Path(path)
        images = [image for image in _find_images(root) if image.parent != root]
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
        return Example(open_image(self._images[index]), label=self._labels[index])


def _find_images(path: Path) -> list[Path]:
    """All images below a folder, sorted by name, so that their order is the same on every host."""
    if not path.is_dir():
        raise UserError(f"expected a folder of images, but {path} is not a folder")
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not images:
        raise UserError(f"{path} holds no image: expected files that end in {', '.join(_SUFFIXES)}")
    return images


def _read_captions(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise UserError(f"{path} is empty: expected at least one line with a caption")
    return captions
