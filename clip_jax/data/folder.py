"""`folder`: images on disk, with captions in text files beside them, or in one sub-folder for each class."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Iterator

from clip_jax.data.checked import decoded_captions, read_file
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.example import Example, Source
from clip_jax.data.held_out import Division, divide
from clip_jax.data.targets import class_name
from clip_jax.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)  # the paper's, section 3.1.4

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_CAPTIONS = ".txt"
_NO_CAPTIONS = ""
_NAMED = 10  # classes whose names the log says

Found = list[tuple[str, str]]  # the path of each image, and the ending of its caption file or `_NO_CAPTIONS`


def open_folder(path: str, templates: tuple[str, ...] = ()) -> Source:
    """Images with captions: from text files beside them, or from the names of class folders by templates.

    Without templates, a folder that has no caption file at all and keeps every image in one of two or more sub-folders
    is taken for class folders, with the paper's template; a line in the log says so.

    Args:
      path: of the folder; images may lie at any depth.
      templates: captions of a class, with `{}` for its name; empty to read caption files.

    Raises:
      UserError: there is no image, or none with a caption, or a template without `{}`.
    """
    found = _find_images(path)
    if not templates and (templates := _own_templates(path, found)):
        logger.info(
            "%s has no caption files: its %d sub-folders are taken for classes, and the captions are %r; "
            "set templates to word them",
            path,
            len({_class_of(image, path) for image, _ in found}),
            templates[0],
        )
    return _opened(path, templates, found)


@functools.lru_cache(maxsize=16)
def open_divided(path: str, templates: tuple[str, ...], share: float) -> tuple[Source, Source, Division]:
    """What of a folder to train on, what to judge by, and how it was divided; says so in the log.

    A process looks once, so that the parts stay apart while somebody adds images.

    Args:
      path: as for `open_folder`.
      templates: as for `open_folder`.
      share: of the images of each class, or of all where they have captions; see `divide`.

    Raises:
      UserError: as `open_folder` and `divide`; or a class folder is empty.
    """
    found = _find_images(path)
    templates = templates or _own_templates(path, found)
    classes = {image: _class_of(image, path) if templates else "" for image, _ in found}
    if templates:
        classes = {image: name for image, name in classes.items() if name}
        _check_no_class_is_empty(path, {*classes.values()})
    division = divide(path, classes, share)
    counts = Counter(classes.values())
    named = ", ".join(f"{name} {counts[name]}" for name in sorted(counts)[:_NAMED]) + ", ..." * (len(counts) > _NAMED)
    captions = f" of {len(counts)} classes ({named}), captions {', '.join(map(repr, templates))}" if templates else ""
    logger.info(
        "%s: %d images%s; %d to train on, %d held out%s",
        path,
        len(classes),
        captions,
        len(division.train),
        len(division.held_out),
        f"; {division.copies} are copies of others, and in the same part as those" if division.copies else "",
    )
    train, held_out = ([item for item in found if item[0] in part] for part in (division.train, division.held_out))
    return _opened(path, templates, train), _opened(path, templates, held_out), division


def images_of(path: str) -> list[str]:
    """The paths of all images below a folder.

    Raises:
      UserError: there is none.
    """
    return [image for image, _ in _find_images(path)]


def _opened(path: str, templates: tuple[str, ...], found: Found) -> Source:
    return LabelledFolder(path, templates, found) if templates else CaptionedFolder(path, found)


def _own_templates(path: str, found: Found) -> tuple[str, ...]:
    """Those of a folder for which none are given: none if it has captions, else the paper's, if it has classes."""
    if any(ending != _NO_CAPTIONS for _, ending in found):
        return ()
    classes = {_class_of(image, path) for image, _ in found}
    if "" in classes or len(classes) < 2:
        raise _without_captions(found)
    return DEFAULT_TEMPLATES


def _check_no_class_is_empty(path: str, classes: set[str]) -> None:
    folders = {entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")}
    if empty := sorted(folders - classes):
        raise UserError(f"{path}/{empty[0]} holds no image: add some, or remove the folder")


class CaptionedFolder:
    """Images anywhere below a folder; `name.txt` beside `name.jpg` holds its captions, one a line.

    Attributes:
      damage: says how many images have no caption file; each of them is damaged when it is read.
    """

    def __init__(self, path: str, found: Found):
        self.name = path
        self._found = found
        missing = any(ending == _NO_CAPTIONS for _, ending in found)
        self.damage = (_without_captions(found),) if missing else ()

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> Example:
        image, ending = self._found[index]
        if ending == _NO_CAPTIONS:
            raise _without_captions([self._found[index]])
        return Example(read_file(image, "image"), _read_captions(_stem(image) + ending), key=image)


class LabelledFolder:
    """Images below one sub-folder for each class; the sub-folders in order of their names are the classes.

    Attributes:
      class_names: the names of the sub-folders, with spaces for underscores.
      templates: of the captions; empty where there are none.
    """

    def __init__(self, path: str, templates: tuple[str, ...] = (), found: Found | None = None):
        if wrong := [template for template in templates if "{}" not in template]:
            raise UserError(f"the template {wrong[0]!r} has no {{}} where the name of the class goes")
        images = [image for image, _ in found or _find_images(path)]
        classes = [_class_of(image, path) for image in images]
        folders = sorted({*classes} - {""})
        if not folders:
            raise UserError(f"{path} has images but no class sub-folders: expected {path}/CLASS/IMAGE")
        if stray := classes.count(""):
            logger.warning("%s: %d images lie in no class sub-folder and are left out", path, stray)
        self.name, self.templates = path, templates
        self.class_names = tuple(map(class_name, folders))
        if len(set(self.class_names)) < len(folders):
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise UserError(f"{path} has two folders for the class {twice!r}, one with underscores: rename one of them")
        self._captions = [tuple(text.replace("{}", name) for text in templates) for name in self.class_names]
        labels = {folder: label for label, folder in enumerate(folders)}
        self._images = [image for image, folder in zip(images, classes, strict=True) if folder]
        self._labels = [labels[folder] for folder in classes if folder]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        image, label = self._images[index], self._labels[index]
        return Example(read_file(image, "image"), self._captions[label], label, key=image)


def _find_images(path: str) -> Found:
    """All images below a folder in the order of their names, folder by folder, which is the same on every host."""
    if not os.path.isdir(path):
        raise UserError(f"expected a folder of images, but {path} is not a folder")
    found = sorted(_scan(path), key=lambda item: item[0].replace(os.sep, "\0"))
    if not found:
        raise UserError(f"{path} holds no image: expected files that end in {', '.join(_IMAGES)}")
    return found


def _scan(path: str) -> Iterator[tuple[str, str]]:
    """The images below a folder, but hidden files (macOS leaves a `._x.jpg` beside `x.jpg`)."""
    images, captions, folders = [], {}, []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            ending = os.path.splitext(entry.name)[1]
            kind = ending.lower()
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and entry.is_dir():
                logger.warning("%s is a link to a folder and left out", entry.path)
            elif kind in _IMAGES and entry.is_file():
                images.append(entry.path)
            elif kind in _IMAGES and entry.is_symlink():
                logger.warning("%s is a broken link and left out", entry.path)
            elif kind == _CAPTIONS and entry.is_file():
                captions[_stem(entry.path)] = ending
    yield from ((image, captions.get(_stem(image), _NO_CAPTIONS)) for image in images)
    for folder in folders:
        yield from _scan(folder)


def _class_of(image: str, path: str) -> str:
    """The sub-folder of `path` that an image is below; "" if it lies in `path` itself."""
    folder, below, _ = image[len(os.path.join(path, "")) :].partition(os.sep)
    return folder if below else ""


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _without_captions(found: Found) -> Damaged:
    missing = [image for image, ending in found if ending == _NO_CAPTIONS]
    needed = os.path.basename(_stem(missing[0])) + _CAPTIONS
    return Damaged(
        "caption",
        f"{len(missing)} of {len(found)} images have no caption file: {missing[0]} needs {needed} beside it; or name a "
        "folder with a sub-folder for each class",
    )


def _read_captions(path: str) -> tuple[str, ...]:
    content = read_file(path, "caption")
    with naming(path):
        lines = [line.strip() for text in decoded_captions([content]) for line in text.splitlines()]
    captions = tuple(filter(None, lines))
    if not captions:
        raise Damaged("caption", f"{path} is empty: expected at least one line with a caption")
    return captions
