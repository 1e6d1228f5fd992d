"""`tfds`: any TensorFlow Datasets data set that is prepared, read without TensorFlow."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds  # brings no TensorFlow along as long as nothing is prepared

from clip_jax.data.checked import decoded_captions
from clip_jax.data.example import Example
from clip_jax.data.tfds_builder import preparation
from clip_jax.data.tfds_records import OPENERS, Records
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
    Fields with the usual names (image; captions, caption or text; label) are found without being named. A text field
    called key, as prepared data sets have it, is what an example is called.

    Attributes:
      name: the data set's full name and the split.
      class_names: the names of the classes, empty where there is no label.
      damage: what is wrong with the files, as far as opening them shows.
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
        self._has_key = isinstance(features.get(("key",)), tfds.features.Text)
        self._features = builder.info.features
        self._decoders = tfds.decode.SkipDecoding()  # of the image, whose bytes are wanted as stored
        for key in reversed(self._image):
            self._decoders = {key: self._decoders}
        self._records = _open_split(builder, split)
        self.damage = getattr(self._records, "damage", ())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
        captions = _follow(record, self._captions) if self._captions else ()
        captions = (captions,) if isinstance(captions, bytes) else captions
        return Example(
            _follow(record, self._image),
            decoded_captions(captions) if self._captions else (),
            _classes(_follow(record, self._label)) if self._label else None,
            record["key"].decode("utf-8", "replace") if self._has_key else "",
        )


def _open_split(builder: tfds.core.DatasetBuilder, split: str) -> Records:
    """The serialised records of a split, or of a slice of one such as `train[:90%]`."""
    name, form = builder.info.full_name, builder.info.file_format
    try:
        parts = builder.info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{name} has no split {split!r}; it has {known}, and slices as train[:90%]") from error
    if not parts or any(part.take < 1 for part in parts):
        raise UserError(f"{name} has no example in {split!r}")
    if form not in OPENERS:
        known = ", ".join(known.value for known in OPENERS)
        raise UserError(
            f"{name} is prepared as {form.value}, expected one of {known}: delete {builder.data_dir} and run "
            f"{_preparation(builder)}"
        )
    return OPENERS[form](parts)


def _preparation(builder: tfds.core.DatasetBuilder) -> str:
    """The command that prepares the same data set in the same place."""
    name, _, version = builder.info.full_name.rpartition("/")
    root = builder.data_path.parents[name.count("/") + 1]
    return preparation(f"{name}:{version}", str(root))


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


def _classes(value: Any) -> int | tuple[int, ...]:
    """One class, or in a sequence of labels each class once."""
    return tuple(sorted({int(number) for number in value})) if np.ndim(value) else int(value)


def _follow(record: Any, path: Path) -> Any:
    for key in path:
        record = record[key]
    return record
