"""Small TFDS data sets that several tests share."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(shade):
    """A uniformly grey image, as a file."""
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, shade, shade)).save(file, "PNG")
    file.seek(0)
    return file


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """Photo k is uniformly grey, of value k, with two captions, a title and a label that name it."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        caption = {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "captions": tfds.features.Sequence(caption),
            "title": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for index in range(count):
            yield (
                index,
                {
                    "image": png(index),
                    "image/filename": f"{index}.png",
                    "captions": [{"id": k, "text": f"Caption {k} of photo {index}: ä"} for k in range(2)],
                    "title": f"Photo {index}",
                    "label": index % 2,
                },
            )


class TinyConfigs(tfds.core.GeneratorBasedBuilder):
    """Three photos, whose captions begin with the name of the configuration."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in ("blue", "green"))
    url_infos = None

    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="png"), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _dl_manager):
        return {"train": self._generate_examples(3)}

    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"image": png(index), "caption": f"{self.builder_config.name} {index}"}
