"""The data sets that a model can be judged on. A new one costs an entry in `registry.toml`."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from clip_jax.data.access import Access
from clip_jax.data.example import Source
from clip_jax.data.folder import DEFAULT_TEMPLATES, LabelledFolder
from clip_jax.data.sources import SOURCES, held_out_of, source_config
from clip_jax.data.wds import WdsSource, is_wds
from clip_jax.errors import UserError
from clip_jax.evaluation import collection, prompts
from clip_jax.evaluation.registry import EVALUATION_SETS, SUITES, Entry
from clip_jax.sealed_json import read_object
from clip_jax.workdir import HELD_OUT, RUN_CONFIG, absolute

SEVERAL_CLASSES = "mean_average_precision"  # the metric of images that can belong to several classes

_USUAL_SPLITS = ("test", "validation")
_SPLIT = "test"  # of the collection, which calls the split of each set so that its numbers are reported on
_TRAIN = "train"
_IMAGENET = "imagenet1k"
_HELD_OUT = "held_out"  # with a workdir, as a kind of data set


@dataclass(frozen=True)
class EvaluationSet:
    """Images with labels, and the words that make a classifier; or images with captions, for retrieval.

    Attributes:
      name: what results call it.
      source: the images.
      class_names: in the order of the labels; empty where there are none.
      templates: sentences around a class name, whose embeddings are averaged (paper section 3.1.4).
      metric: what it is judged by, one of `evaluation.metrics.METRICS`.
      train: opens what a linear probe is fitted to, with the same classes; None where there is none.
      validation: opens what its regularisation is chosen by; None for a part of `train`.
      occurring: how many of the classes have images, if not all; the others do not count.
    """

    name: str
    source: Source
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    metric: str = "acc1"
    train: Callable[[], Source] | None = None
    validation: Callable[[], Source] | None = None
    occurring: int = 0


def accepted_names() -> str:
    """What `evaluation_set` opens, in words."""
    return (
        f"one of {', '.join((*SUITES, *EVALUATION_SETS))}, a folder with one sub-folder for each class or in the "
        f"layout of clip-benchmark/wds_*, {_HELD_OUT}:WORKDIR for what a run holds out, KIND:PATH as in "
        f"tar:shards/*.tar (KIND of {', '.join(_kinds_with_path())}), or a TFDS data set (NAME or NAME/SPLIT)"
    )


def expanded(names: Sequence[str]) -> list[str]:
    """Names of data sets, with the members of a suite such as `paper27` in its place."""
    return [member for name in names for member in SUITES.get(name, (name,))]


def evaluation_set(
    name: str, access: Access = Access(), class_names: Sequence[str] = (), templates: Sequence[str] = ()
) -> EvaluationSet:
    """Open a data set to judge a model on.

    Args:
      name: one of `EVALUATION_SETS`; a folder with one sub-folder for each class, or in the layout of the collection
        `clip-benchmark/wds_*` (its test split, or a split's folder); held_out:WORKDIR, what a run holds out;
        KIND:PATH, the source of that kind in a configuration's `data`; or a TFDS data set: NAME (its test split, or
        else its validation split) or NAME/SPLIT.
      access: where data sets are kept, and whether missing ones may be fetched.
      class_names: in place of its own, in the order of its labels.
      templates: in place of its own.

    Raises:
      UserError: there is no such data set, a part of it is damaged, or its classes have no names or another number.
    """
    entry = EVALUATION_SETS.get(name)
    opened = _open_unlisted(name, access) if entry is None else _open_entry(name, entry, access)
    source, labels = opened.source, opened.class_names
    if damage := getattr(source, "damage", ()):  # without a part of the data, the score would be another one
        raise UserError(f"{source.name} is damaged, {len(damage)} times; first: {damage[0]}")
    entry = entry or Entry(metric=SEVERAL_CLASSES if getattr(source, "type", "") == "multilabel" else "acc1")
    if class_names and labels and len(class_names) != len(labels):
        raise UserError(f"{name} has {len(labels)} classes, but --class_names names {len(class_names)}")
    as_trained = labels if name.startswith(f"{_HELD_OUT}:") else ()
    names = tuple(class_names) or as_trained or _class_names(source, entry, labels)
    if templates:
        sentences = tuple(templates)
    elif own := getattr(source, "templates", ()):
        sentences = prompts.checked_templates(own, source.name)
    else:
        sentences = prompts.templates_of(entry)
    return dataclasses.replace(
        opened,
        class_names=names,
        templates=sentences,
        metric=entry.metric,
        occurring=_occurring(source, entry, names),
    )


def _class_names(source: Source, entry: Entry, labels: tuple[str, ...]) -> tuple[str, ...]:
    """What the prompts call the classes."""
    if entry.source:  # the names of the entry were written for the labels of this very source
        return entry.class_names or labels
    if isinstance(source, WdsSource) or not labels:
        return labels
    if prompts.are_synsets(labels):
        return prompts.class_names_of(Entry(class_names=_IMAGENET), labels, source.name)
    named = entry.class_names or entry.renamed
    if not named and prompts.look_like_ids(labels):
        raise UserError(
            f"the classes of {source.name} are called {labels[0]!r}, {labels[-1]!r} and so on, which no caption says: "
            "name them with --class_names FILE"
        )
    return prompts.class_names_of(entry, labels, source.name) if entry.classes else labels


def _occurring(source: Source, entry: Entry, names: tuple[str, ...]) -> int:
    """How many classes have images, if the data set has labels for more; whatever else differs is an error."""
    if not entry.classes or len(names) == entry.classes:
        return 0
    if entry.class_names == _IMAGENET and len(names) == len(prompts.imagenet_synsets()):
        return entry.classes
    raise UserError(f"{source.name}: expected the names of {entry.classes} classes, got {len(names)}")


def _open_entry(name: str, entry: Entry, access: Access) -> EvaluationSet:
    """What lies here first, then what can be fetched; with the labels in place of names for the classes."""
    if entry.source:
        source = source_config(name, entry.source).open(access)
        train = None if not entry.train else partial(source_config(name, entry.train).open, access)
        return EvaluationSet(name, source, source.class_names, train=train)
    root = access.data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    wds, folder = os.path.join(root, collection.folder_name(entry.wds)), os.path.join(root, f"folder_{name}")
    if entry.wds and is_wds(wds, _SPLIT):
        return _open_wds(name, wds, _SPLIT)
    if entry.classes and os.path.isdir(folder):
        return _open_folder(name, folder)
    if entry.tfds and _is_prepared(entry, access):
        return _open_tfds(name, entry, access)
    failures = []
    if entry.wds:
        try:
            fetched = collection.fetch(entry.wds, _SPLIT, access)
        except UserError as error:
            failures.append(str(error))
        else:
            source = WdsSource(fetched, _SPLIT)
            return EvaluationSet(name, source, source.class_names, train=partial(_open_training, entry.wds, access))
    if entry.tfds:
        try:
            return _open_tfds(name, entry, access)
        except UserError as error:
            failures.append(str(error))
    obtain = f": nobody distributes it; {entry.obtain}" if entry.obtain else ""
    places = [f"{wds}/{_SPLIT}/0.tar and so on"] * bool(entry.wds) + [f"{folder}/CLASS/IMAGE"] * bool(entry.classes)
    reasons = "; ".join([f"expected {' or '.join(places)}", *failures])
    raise UserError(f"{name} is not here{obtain}: {reasons}")


def _open_wds(name: str, root: str, split: str) -> EvaluationSet:
    source = WdsSource(root, split)
    has_train = split != _TRAIN and is_wds(root, _TRAIN)
    return EvaluationSet(
        name, source, source.class_names, train=partial(WdsSource, root, _TRAIN) if has_train else None
    )


def _open_training(name: str, access: Access) -> WdsSource:
    """The training split of a data set of the collection, fetched only when somebody wants it."""
    return WdsSource(collection.fetch(name, _TRAIN, access), _TRAIN)


def _open_folder(name: str, path: str) -> EvaluationSet:
    """Class folders; those in a folder `train` beside theirs, if there is one, are for training."""
    source, train = LabelledFolder(path), Path(path).resolve().parent / _TRAIN
    opens = partial(LabelledFolder, str(train)) if train.is_dir() and train != Path(path).resolve() else None
    return EvaluationSet(name, source, source.class_names, train=opens)


def _is_prepared(entry: Entry, access: Access) -> bool:
    from clip_jax.data import tfds_builder  # imports TFDS

    return tfds_builder.prepared(entry.tfds["name"], access.data_dir) is not None


def _open_tfds(name: str, entry: Entry, access: Access) -> EvaluationSet:
    from clip_jax.data import tfds_builder, tfds_source  # import TFDS

    builder = tfds_builder.open_builder(entry.tfds["name"], access)
    opens = partial(tfds_source.TfdsSource, builder, label_field=entry.tfds.get("label_field", ""))
    splits = {other: other for other in _other_splits(entry.tfds["split"], builder.info.splits)}
    if entry.train:
        splits = {_TRAIN: entry.train["split"]}
    source = opens(entry.tfds["split"])
    return EvaluationSet(
        name, source, source.class_names, **{part: partial(opens, split) for part, split in splits.items()}
    )


def _other_splits(split: str, splits: Iterable[str]) -> list[str]:
    return [other for other in (_TRAIN, "validation") if other != split.partition("[")[0] and other in splits]


def held_out_sets(data: Mapping[str, Any]) -> list[EvaluationSet]:
    """What the sources of a run hold out of training, by the names of the sources.

    Classes have the captions of training as their prompts; a linear probe is fitted to what the run trains on.

    Args:
      data: of the run's configuration.

    Raises:
      UserError: a folder that is missing or cannot be divided.
    """
    sets = []
    for name, source in held_out_of(data).items():
        _, held_out, _ = source.divided()
        names, templates = (getattr(held_out, what, ()) for what in ("class_names", "templates"))
        sets.append(EvaluationSet(name, held_out, names, templates, train=partial(source.open, Access())))
    return sets


def _open_held_out(name: str, workdir: str) -> EvaluationSet:
    """What the run in a workdir held out, if it is still that."""
    root = absolute(workdir)
    if not (root / HELD_OUT).exists():
        raise UserError(f"{workdir} has no {HELD_OUT}: expected the workdir of a run whose data has held_out above 0")
    data, stated = read_object(root / RUN_CONFIG).get("data", {}), read_object(root / HELD_OUT)
    for source, config in held_out_of(data).items():
        if config.parts() != stated.get(source):
            raise UserError(
                f"the images in {config.path} are not those that the run in {workdir} began with: some that it has "
                f"learned from could be judged now; {HELD_OUT} lists them"
            )
    sets = held_out_sets(data)
    if len(sets) != 1:
        raise UserError(f"{workdir} holds out parts of {len(sets)} sources; one can be opened by name")
    return dataclasses.replace(sets[0], name=name)


def _kinds_with_path() -> list[str]:
    return [kind for kind, config in SOURCES.items() if any(field.name == "path" for field in fields(config))]


def _open_unlisted(name: str, access: Access) -> EvaluationSet:
    kind, _, path = name.partition(":")
    if kind == _HELD_OUT:
        return _open_held_out(name, path)
    if kind in _kinds_with_path():
        source = source_config(kind, {"path": path}).open(access)
        return EvaluationSet(name, source, getattr(source, "class_names", ()))
    if not (os.path.isdir(name) or "://" in name or name.startswith((".", os.sep))):
        return _open_any_tfds(name, access)
    root, split = os.path.split(name.rstrip("/"))
    if is_wds(root, split):
        return _open_wds(name, root, split)
    return _open_wds(name, name, _SPLIT) if is_wds(name, _SPLIT) else _open_folder(name, name)


def _open_any_tfds(name: str, access: Access) -> EvaluationSet:
    """NAME or NAME/SPLIT, where NAME may hold slashes itself."""
    from clip_jax.data import tfds_builder, tfds_source  # import TFDS

    prefix, _, split = name.rpartition("/")
    try:
        builder = tfds_builder.open_builder(name, access)
        split = next((usual for usual in _USUAL_SPLITS if usual in builder.info.splits), _USUAL_SPLITS[0])
    except tfds_builder.UnknownDataSet:
        try:
            builder = tfds_builder.open_builder(prefix or name, access)
        except tfds_builder.UnknownDataSet as error:
            raise UserError(f"unknown evaluation set {name!r}: expected {accepted_names()}; {error}") from error
    source = tfds_source.TfdsSource(builder, split)
    others = _other_splits(split, builder.info.splits)
    return EvaluationSet(
        name,
        source,
        source.class_names,
        **{other: partial(tfds_source.TfdsSource, builder, other) for other in others},
    )
