"""The fields of a prepared data set, for TFDS."""

import tensorflow_datasets as tfds  # brings no TensorFlow along

from clip_jax.data.preparation.job import Shape


def make_features(shape: Shape, classes: int) -> tfds.features.FeaturesDict:
    """The fields of a sample, for TFDS.

    Args:
      shape: what the samples have.
      classes: how many there are, if they have no names.
    """
    features = {
        "image": tfds.features.Image(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "key": tfds.features.Text(),
    }
    if shape.labels:
        names = {"names": list(shape.class_names)} if shape.class_names else {"num_classes": classes}
        features["label"] = tfds.features.ClassLabel(**names)
    return tfds.features.FeaturesDict(features)
