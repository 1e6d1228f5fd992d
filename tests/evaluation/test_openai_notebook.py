"""Zero-shot classification against a plain PyTorch script: OpenAI's model class and the recipe of their notebook."""

import dataclasses
import io
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
from PIL import Image
from sklearn.metrics import recall_score, top_k_accuracy_score

import evaluate
from clip_jax.data.access import Access
from clip_jax.evaluation.datasets import evaluation_set
from clip_jax.evaluation.retrieval import zero_shot_retrieval
from clip_jax.evaluation.zero_shot import zero_shot
from clip_jax.processing import tokenize
from tests import reference_models
from tests.data.make_shards import add

CLASSES = ("bark", "coral", "ember", "fern", "lagoon", "moss")
TEMPLATES = ("a photo of {}.", "{} seen from above.")
COUNT = 24


def picture(number):
    """A PNG of its own size, whose colours and grain belong to its class."""
    generator = np.random.default_rng(number)
    colours = np.random.default_rng(100 + number % len(CLASSES)).integers(0, 256, (3, 2, 3))
    width, height = generator.integers(40, 90, 2)
    pixels = np.resize(np.repeat(colours, 9, axis=1), (height, width, 3)) + generator.integers(
        -60, 60, (height, width, 3)
    )
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def label(number):
    return number * 5 % len(CLASSES) if number % 4 else 0  # some classes have more images


def write_folders(root):
    for number in range(COUNT):
        path = root / CLASSES[label(number)] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return str(root)


def write_shards(root):
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(CLASSES))
    (root / "test" / "nshards.txt").write_text("2")
    for shard in range(2):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as archive:
            for number in range(shard, COUNT, 2):
                add(archive, f"{number:03}.png", picture(number))
                add(archive, f"{number:03}.cls", str(label(number)).encode())
    return str(root)


class NotebookPictures(tfds.core.GeneratorBasedBuilder):
    """The same pictures."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _dl_manager):
        return {"test": ((n, {"image": io.BytesIO(picture(n)), "label": label(n)}) for n in range(COUNT))}

    def _generate_examples(self):
        raise NotImplementedError


def write_tfds(root):
    NotebookPictures(data_dir=str(root), file_format="array_record").download_and_prepare()
    return "notebook_pictures"


WRITERS = {"folders": write_folders, "tar": write_shards, "tfds": write_tfds}


def with_openais_words(config):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=49408))


@pytest.fixture(scope="module", params=[reference_models.ODD_VIT, reference_models.ODD_RESNET], ids=["ViT", "ResNet"])
def reference(request, tmp_path_factory):
    """OpenAI's model with random weights, its configuration, and ours read from its file."""
    config = with_openais_words(request.param)
    model = reference_models.random_openai_model(config, seed=1)  # which takes the pictures for several classes
    path = tmp_path_factory.mktemp("weights") / "openai.pt"
    reference_models.save_torchscript(model, config, path)
    return model, config, evaluate.load_encoders(str(path), None)


def notebook(model, config, images):
    """`zeroshot_classifier` and the loop over batches of OpenAI's notebook, with PIL in place of torchvision."""
    length = config.text.context_length
    with torch.no_grad():
        weights = []
        for name in CLASSES:
            texts = torch.from_numpy(tokenize([template.format(name) for template in TEMPLATES], length))
            embeddings = model.encode_text(texts)
            embeddings /= embeddings.norm(dim=-1, keepdim=True)
            embedding = embeddings.mean(dim=0)
            weights.append(embedding / embedding.norm())
        weights = torch.stack(weights, dim=1)
        features = model.encode_image(torch.stack([transformed(image, config) for image in images]))
        features /= features.norm(dim=-1, keepdim=True)
        return (100.0 * features @ weights).numpy()


def transformed(content, config):
    side = config.vision.image_resolution
    image = Image.open(io.BytesIO(content))
    width, height = (int(side * length / min(image.size)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


@pytest.mark.parametrize("form", WRITERS)
def test_predictions_and_metrics_are_those_of_the_notebook(form, reference, tmp_path):
    model, config, ours = reference
    dataset = evaluation_set(WRITERS[form](tmp_path / "set"), Access(str(tmp_path / "set")), templates=TEMPLATES)
    assert dataset.class_names == CLASSES
    result = zero_shot(*ours, dataset, progress=False)
    order = [number_of(dataset.source[index].image) for index in range(COUNT)]
    assert sorted(order) == list(range(COUNT))
    logits = notebook(model, config, [picture(number) for number in order])
    labels = np.array([label(number) for number in order])
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_allclose(100 * result.scores, logits, atol=0.004)
    best = np.sort(logits, axis=1)
    assert np.diff(best, axis=1).min() > 0.008, "two classes are too near to each other to say which one is right"
    np.testing.assert_array_equal(result.scores.argsort(axis=1), logits.argsort(axis=1))
    predictions = logits.argmax(axis=1)
    assert len(set(predictions)) > 1
    assert result.metrics == pytest.approx(
        {
            "acc1": float((predictions == labels).mean()),
            "acc5": top_k_accuracy_score(labels, logits, k=5, labels=range(len(CLASSES))),
            "mean_per_class_recall": recall_score(labels, predictions, average="macro", labels=np.unique(labels)),
        }
    )


def number_of(image):
    """Which picture an image is, as a file or decoded again."""
    pixels = np.asarray(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image)
    return next(n for n in range(COUNT) if np.array_equal(np.asarray(Image.open(io.BytesIO(picture(n)))), pixels))


# Of "Interacting with CLIP", a notebook of the reference repository; the photographs come with scikit-image.
DESCRIPTIONS = {
    "astronaut.png": "a portrait of an astronaut with the American flag",
    "camera.png": "a person looking at a camera on a tripod",
    "chelsea.png": "a facial photo of a tabby cat",
    "coffee.png": "a cup of coffee on a saucer",
    "horse.png": "a black-and-white silhouette of a horse",
    "motorcycle_right.png": "a red motorcycle standing in a garage",
    "page.png": "a page of text about segmentation",
    "rocket.jpg": "a rocket standing on a launchpad",
}


def test_photographs_and_captions(reference, tmp_path):
    model, config, ours = reference
    (package,) = find_spec("skimage").submodule_search_locations
    contents = [(Path(package) / "data" / name).read_bytes() for name in DESCRIPTIONS]
    for (name, caption), content in zip(DESCRIPTIONS.items(), contents, strict=True):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    result = zero_shot_retrieval(*ours, evaluation_set(f"folder:{tmp_path}"), progress=False)
    texts = tokenize(list(DESCRIPTIONS.values()), config.text.context_length, truncate=True)
    with torch.no_grad():
        images = model.encode_image(torch.stack([transformed(content, config) for content in contents])).numpy()
        texts = model.encode_text(torch.from_numpy(texts)).numpy()
    images, texts = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (images, texts))
    cosines, expected = result.image_features @ result.text_features.T, images @ texts.T
    np.testing.assert_allclose(cosines, expected, atol=4e-5)
    own = np.arange(len(DESCRIPTIONS))
    np.testing.assert_array_equal(result.image_of_text, own)
    for name, table in (("text", expected), ("image", expected.T)):
        others = table + 4 * np.eye(len(own)) - np.diag(table)[:, None]
        assert np.abs(others).min() > 8e-5, "two of them are too near to each other to say which one is right"
        ranks = (table > np.diag(table)[:, None]).sum(axis=1)
        for k in (1, 5):
            assert result.metrics[f"{name}_retrieval_recall@{k}"] == np.mean(ranks < k)
        assert result.metrics[f"{name}_retrieval_median_rank"] == np.median(ranks) + 1
