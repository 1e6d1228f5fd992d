"""`tfds`: any TensorFlow Datasets data set that is prepared as array records, read without TensorFlow."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds  # brings no TensorFlow along as long as only array records are used

from clip_jax.data.example import Example
from clip_jax.errors import UserError

Path = tuple[str, ...]

_USUAL_NAMES = {
    tfds.features.Image: ("image",),
    tfds.features.Text: ("captions", "caption", "text", "captions/text"),
    tfds.features.ClassLabel: ("label",),
}


class TfdsSource:
    """One split of a prepared data set.

    A field is named by its path: `captions/text` is the text in a sequence of dictionaries called captions.
    Fields with the usual names (image; captions, caption or text; label) are found without being named.

    Attributes:
      name: the data set's full name and the split.
      class_names: the names of the classes, empty where there is no label.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        image_field: str = "",
        caption_field: str = "",
        label_field: str = "",
    ):
        name, features = builder.info.full_name, dict(_leaves(builder.info.features))
        self.name = f"{name}/{split}"
        self._image = _find(features, tfds.features.Image, image_field, name)
        self._captions = _find(features, tfds.features.Text, caption_field, name)
        self._label = _find(features, tfds.features.ClassLabel, label_field, name)
        if not self._image:
            raise UserError(f"{name} has no field called image: name its image field in image_field")
        self.class_names = tuple(features[self._label].names) if self._label else ()
        self._records = _open_split(builder, split, self._image)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        captions = _follow(record, self._captions) if self._captions else ()
        captions = (captions,) if isinstance(captions, bytes) else captions
        return Example(
            _follow(record, self._image),
            tuple(caption.decode("utf-8", errors="replace") for caption in captions),
            int(_follow(record, self._label)) if self._label else None,
        )


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Open a data set that is already prepared, from its files alone.

    Args:
      name: as TFDS spells it: `cifar10`, `coco_captions/2017`, `mnist:3.0.1`.
      data_dir: where TFDS keeps its data sets; "" is TFDS's own default, which `TFDS_DATA_DIR` sets.

    Raises:
      UserError: there is no such data set; the message says how to prepare it.
    """
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except ValueError as error:  # TFDS's DatasetNotFoundError is one too
        raise UserError(
            f"the TFDS data set {name!r} is not prepared in {data_dir or tfds.core.constants.DATA_DIR}: "
            f"run {_preparation(name, data_dir)}"
        ) from error


def _preparation(name: str, data_dir: str) -> str:
    """The command that downloads and prepares a data set in the format that is needed here."""
    arguments = f"'{name}', file_format='array_record'" + (f", data_dir='{data_dir}'" if data_dir else "")
    statement = f"import tensorflow_datasets as tfds; tfds.builder({arguments}).download_and_prepare()"
    return f'python -c "{statement}"'


def _open_split(builder: tfds.core.DatasetBuilder, split: str, image: Path) -> Any:
    """The records of a split (which may be a slice, `train[:90%]`), with the image left as encoded bytes."""
    if split.partition("[")[0] not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{builder.info.full_name} has no split {split!r}; it has {known}")
    decoders = tfds.decode.SkipDecoding()
    for key in reversed(image):
        decoders = {key: decoders}
    try:
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{builder.info.full_name} is prepared as {builder.info.file_format.value}, expected array_record: "
            f"delete {builder.data_dir} and run {_preparation(builder.info.full_name, '')}"
        ) from error


def _leaves(feature: tfds.features.FeatureConnector, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every feature that holds values, with its path through dictionaries and sequences."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for key, inner in feature.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, path)
    else:
        yield path, feature


def _find(features: dict[Path, Any], kind: type, wanted: str, name: str) -> Path | None:
    """The path of the field of a kind that is wanted by name, or else has a usual name; None without one."""
    of_kind = {"/".join(path): path for path, feature in features.items() if isinstance(feature, kind)}
    if wanted and wanted not in of_kind:
        known = ", ".join(sorted(of_kind)) or "none"
        raise UserError(f"{name} has no {kind.__name__} field {wanted!r}; its {kind.__name__} fields: {known}")
    return next((of_kind[field] for field in (wanted, *_USUAL_NAMES[kind]) if field in of_kind), None)


def _follow(record: Any, path: Path) -> Any:
    for key in path:
        record = record[key]
    return record
