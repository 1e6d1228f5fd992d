"""A small TFDS data set, prepared as array records, that several tests share."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


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
            png = io.BytesIO()
            Image.new("RGB", (6, 5), (index, index, index)).save(png, "PNG")
            png.seek(0)
            yield (
                index,
                {
                    "image": png,
                    "image/filename": f"{index}.png",
                    "captions": [{"id": k, "text": f"Caption {k} of photo {index}: ä"} for k in range(2)],
                    "title": f"Photo {index}",
                    "label": index % 2,
                },
            )
