"""Every registered data set in each of its forms, with generated images in place of the real ones."""

import io
import logging
import tarfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from clip_jax.evaluation import collection, prompts
from clip_jax.evaluation.registry import EVALUATION_SETS
from tests.data.make_shards import add

LISTED = {name: entry for name, entry in EVALUATION_SETS.items() if entry.classes}
FORMS = {
    "wds": [name for name, entry in LISTED.items() if entry.wds],
    "tfds": [name for name, entry in LISTED.items() if entry.tfds],
    "folder": [name for name, entry in LISTED.items() if entry.obtain],
}
_CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm"""
# What TFDS learns when it prepares a data set; before, it has numbers.
NAMES_OF_DOWNLOADS = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": _CIFAR100.split(),
    "stl10": ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
}


def photo(number, size=(8, 8)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def words(count):
    """Names that are neither numbers nor in another order when they are sorted."""
    return [f"thing number {number:03}" for number in range(count)]


def names_in_the_collection(name):
    """What `classnames.txt` has: the listed names, or some."""
    entry = LISTED[name]
    listed = prompts.listed_class_names(entry)
    return list(listed) if len(listed) == entry.classes else words(entry.classes)


def write_wds(root, name, images=6):
    """As the collection's own tool writes it, in `root/wds_NAME`."""
    entry = LISTED[name]
    folder = root / collection.folder_name(entry.wds)
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names_in_the_collection(name)) + "\n")
    templates = "\n".join(prompts.templates_of(entry))
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    several = entry.metric == "mean_average_precision"
    if several:
        (folder / "dataset_type.txt").write_text("multilabel")
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for number in range(shard, images, 2):
                label = number * 37 % entry.classes
                add(archive, f"s{number:07}.webp", photo(number))
                if several:
                    file = io.BytesIO()
                    np.save(file, np.isin(np.arange(entry.classes), [label, number]).astype(np.int64))
                    add(archive, f"s{number:07}.npy", file.getvalue())
                else:
                    add(archive, f"s{number:07}.cls", str(label).encode())
    (folder / "test" / "nshards.txt").write_text("2\n")
    return folder


def write_tfds(root, name):
    """Prepared by TFDS's own builder, with its own features, from generated examples."""
    entry = LISTED[name]
    logging.getLogger("absl").setLevel(logging.ERROR)
    builder = tfds.builder(entry.tfds["name"], data_dir=str(root), file_format="array_record")
    split = entry.tfds["split"].partition("[")[0]
    features = builder.info.features
    count = 1000 if entry.classes == 200 else 30

    def generate(*_, **__):
        if entry.tfds["name"] in NAMES_OF_DOWNLOADS:
            features["label"].names = NAMES_OF_DOWNLOADS[entry.tfds["name"]]
        return {split: ((number, _example(features, entry, number)) for number in range(count))}

    builder._split_generators = generate
    builder.download_and_prepare()


def _example(features, entry, number):
    example = {key: _value(feature, number) for key, feature in features.items()}
    if entry.metric == "mean_average_precision":
        example["labels"] = [number % entry.classes, number * 7 % entry.classes]
    else:
        example["label"] = number % entry.classes * (5 if entry.classes == 200 else 1)  # 200 of 1,000
    return example


def _value(feature, number):
    if isinstance(feature, tfds.features.Image):
        height, width, channels = feature.shape
        image = np.zeros((height or 8, width or 8, channels), feature.np_dtype)
        image[: image.shape[0] // 2] = number % 256
        return image
    if isinstance(feature, tfds.features.Sequence):
        return []
    if isinstance(feature, tfds.features.BBoxFeature):
        return tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
    if isinstance(feature, tfds.features.ClassLabel):
        return 0
    return f"{number}"


def write_folders(root, name):
    entry = LISTED[name]
    labels = prompts.listed_class_names(entry) or words(entry.classes)
    for number, label in enumerate(labels):
        folder = root / f"folder_{name}" / label.replace(" ", "_")
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(photo(number))


WRITERS = {"wds": write_wds, "tfds": write_tfds, "folder": write_folders}
