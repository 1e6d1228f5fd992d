import dataclasses
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.metrics import mean_average_precision
from clip_jax.evaluation.retrieval import RetrievalResult
from clip_jax.evaluation.zero_shot import ZeroShotResult
from clip_jax.reports import retrieval, several_classes, zero_shot
from clip_jax.reports.evaluation import write_report


class Pictures:
    """Random images, of as many classes as one likes."""

    name = "pictures"

    def __init__(self, classes):
        self._classes = classes

    def __len__(self):
        return 10

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        return Example(Image.fromarray(pixels), label=index % self._classes)


class Page(HTMLParser):
    """The pictures, the text and the tags of a page."""

    def __init__(self, path):
        super().__init__()
        self.sources, self.texts, self.tags = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def result_of(names):
    labels = np.arange(10) % len(names)
    scores = np.random.default_rng(0).normal(size=(10, len(names))).astype(np.float32)
    scores[:5] += 9 * np.eye(len(names), dtype=np.float32)[labels[:5]]
    return ZeroShotResult(EvaluationSet("pictures", Pictures(len(names)), names), scores, labels)


def test_the_page_is_one_file_without_outside_references(tmp_path):
    path = tmp_path / "new" / "report.html"
    result = result_of(("cat", "dog & <script>", "a $b$ {{ c }}"))
    write_report(path, "A <title>", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], [result])
    page = Page(path)
    predictions = result.scores.argmax(axis=1)
    wrong = int((predictions != result.labels).sum())
    samples = min(wrong, 4) + 10 - wrong  # a third of the twelve places at most are for mistakes
    pairs = len({pair for pair in zip(result.labels, predictions, strict=True) if pair[0] != pair[1]})
    # and a picture a class, two a confused pair, the eight least certain, the loss curve, the confusion
    assert len(page.sources) == samples + 3 + 2 * pairs + 8 + 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert {"A <title>", "a photo of a dog & <script>.", "a photo of a a $b$ {{ c }}."} <= set(page.texts)
    assert f"{result.metrics['acc1']:.1%}" in page.texts


def test_a_metric_that_does_not_exist_is_a_dash(tmp_path):
    results = [result_of(tuple(f"thing {k}" for k in range(classes))) for classes in (3, 6)]
    write_report(tmp_path / "page.html", "T", [], results)
    texts = Page(tmp_path / "page.html").texts
    few, many = np.reshape(texts[texts.index("mean per class") + 1 :][:12], (2, 6)).tolist()
    assert (few[:3], few[4]) == (["pictures", "10", "3"], "\u2013")
    assert (many[:3], many[4]) == (["pictures", "10", "6"], f"{results[1].metrics['acc5']:.1%}")
    assert not [text for text in texts if "nan" in text.lower()]


def test_many_classes_make_no_huge_picture(tmp_path):
    write_report(tmp_path / "page.html", "T", [], [result_of(tuple(f"thing {k}" for k in range(1000)))])
    assert "Left out: 1000 classes are too many for a picture." in Page(tmp_path / "page.html").texts


def rendered(result):
    """What the template gets of a result, with the numbers of images in place of pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (zero_shot, several_classes, retrieval):
            patch.setattr(module, "thumbnail", lambda dataset, index: int(index))
        section = retrieval.retrieval_section if isinstance(result, RetrievalResult) else None
        if not section:
            section = (
                zero_shot.zero_shot_section if result.labels.ndim == 1 else several_classes.several_classes_section
            )
        return section(result)


def scored(labels, predictions, classes, seed=1):
    """Random scores whose best class is the predicted one."""
    scores = np.random.default_rng(seed).random((len(labels), classes)).astype(np.float32)
    scores[np.arange(len(labels)), predictions] = 1 + np.random.default_rng(seed).random(len(labels))
    names = tuple(f"thing {k}" for k in range(classes))
    return ZeroShotResult(EvaluationSet("things", Pictures(classes), names), scores, np.array(labels))


def test_the_worst_classes_and_what_they_are_taken_for():
    result = scored([0, 0, 0, 0, 1, 1, 3, 3, 3], [0, 0, 0, 0, 3, 1, 1, 1, 0], 5)
    rows = [(row["name"], row["images"], row["value"], row["taken_for"]) for row in rendered(result)["per_class"]]
    assert rows == [("thing 3", 3, 0.0, "thing 1"), ("thing 1", 2, 0.5, "thing 3"), ("thing 0", 4, 1.0, "")]


def test_confused_pairs_show_the_surest_mistake_and_the_other_class():
    labels, predictions = [0, 0, 0, 1, 2, 2, 1, 3], [1, 1, 2, 1, 1, 4, 1, 3]
    result = scored(labels, predictions, 5)
    best_two = np.sort(result.scores, axis=1)[:, -2:]
    margins = best_two[:, 1] - best_two[:, 0]
    pairs = rendered(result)["pairs"]
    assert [(pair["truth"], pair["prediction"], pair["count"], pair["images"]) for pair in pairs] == [
        ("thing 0", "thing 1", 2, 3), ("thing 0", "thing 2", 1, 3), ("thing 2", "thing 1", 1, 2),
        ("thing 2", "thing 4", 1, 2),
    ]  # fmt: skip
    right_ones, wrong_twos = max((3, 6), key=lambda n: margins[n]), max((4, 5), key=lambda n: margins[n])
    assert [pair["picture"] for pair in pairs] == [max((0, 1), key=lambda n: margins[n]), 2, 4, 5]
    assert [pair["example"] for pair in pairs] == [right_ones, wrong_twos, right_ones, ""]  # nothing is a thing 4


def test_the_least_certain_images_have_the_nearest_scores():
    result = scored(np.arange(30) % 4, np.arange(30) % 3, 4)
    distances = [np.subtract(*np.sort(row)[:-3:-1]) for row in result.scores]
    shown = rendered(result)["uncertain"]
    assert [image["picture"] for image in shown] == sorted(range(30), key=lambda n: distances[n])[:8]
    for image in shown:
        row, label = result.scores[image["picture"]], result.labels[image["picture"]]
        order = np.argsort(-row)[:2]
        assert image["best"] == [(f"thing {k}", float(row[k]), bool(k == label)) for k in order]
        assert image["truth"] == f"thing {label}"


def test_blocks_do_not_matter(monkeypatch):
    result = scored(np.arange(30) % 4, np.arange(30) % 3, 4)
    whole = rendered(result)
    monkeypatch.setattr(zero_shot, "_BLOCK", 7)
    assert rendered(result) == whole


def test_one_class_alone_and_no_mistake(tmp_path):
    write_report(tmp_path / "page.html", "T", [], [scored([0, 0], [0, 0], 1)])
    texts = Page(tmp_path / "page.html").texts
    assert "Least certain" not in texts and "Confused most often" not in texts


def test_images_of_several_classes_have_pictures(tmp_path):
    scores = np.random.default_rng(0).random((10, 4)).astype(np.float32)
    labels = np.random.default_rng(1).random((10, 4)) < 0.4
    labels[:, 3] = False
    labels[9] = False
    names = ("cat", "dog", "owl", "<script>")
    result = ZeroShotResult(EvaluationSet("voc", Pictures(4), names, metric="mean_average_precision"), scores, labels)
    shown = rendered(result)
    precisions = {names[k]: mean_average_precision(scores[:, [k]], labels[:, [k]]) for k in range(3)}
    assert {row["name"]: row["value"] for row in shown["per_class"]} == precisions
    assert [row["value"] for row in shown["per_class"]] == sorted(precisions.values())
    for worst in shown["worst"]:
        column = names.index(worst["name"])
        order = np.argsort(-scores[:, column]).tolist()
        alarm = next(n for n in order if not labels[n, column])
        miss = next(n for n in reversed(order) if labels[n, column])
        assert worst["alarm"] == {"picture": alarm, "rank": order.index(alarm) + 1}
        assert worst["miss"] == {"picture": miss, "rank": order.index(miss) + 1}
    best = scores.argmax(axis=1)
    right = [bool(labels[sample["picture"], best[sample["picture"]]]) for sample in shown["samples"]]
    assert right == sorted(right) and [sample["truth"] for sample in shown["samples"] if sample["picture"] == 9] == [
        "none of them"
    ]
    write_report(tmp_path / "page.html", "T", [], [result])
    page = Page(tmp_path / "page.html")
    assert len(page.sources) == len(shown["samples"]) + 2 * 3 and "script" not in page.tags
    assert not [text for text in page.texts if "nan" in text.lower()]


class Captioned(Pictures):
    def __getitem__(self, index):
        captions = tuple(f"<i>image {index}, caption {number}" for number in range(1 + index % 3))
        return dataclasses.replace(super().__getitem__(index), captions=captions)


def test_retrieval_shows_queries_that_fail_and_that_succeed(tmp_path):
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(10), 1 + np.arange(10) % 3)
    images = np.eye(10, 16)
    texts = images[owner] + 0.6 * generator.normal(size=(len(owner), 16))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    result = RetrievalResult(
        EvaluationSet("photos", Captioned(3)), images.astype(np.float32), texts.astype(np.float32), owner
    )
    shown, cosines = rendered(result), result.text_features.astype(float) @ result.image_features.astype(float).T
    texts_of = [f"<i>image {n}, caption {k}" for n in range(10) for k in range(1 + n % 3)]
    ranks = []
    for query in shown["from_text"]:
        text = texts_of.index(query["caption"])
        order = np.argsort(-cosines[text]).tolist()
        assert [image for image, _, _ in query["found"]] == order[:5]
        assert [right for _, _, right in query["found"]] == [n == owner[text] for n in order[:5]]
        assert query["rank"] == order.index(owner[text]) + 1
        assert query["own"] == (owner[text] if query["rank"] > 5 else "")
        ranks.append(query["rank"])
    assert min(ranks[:3]) > 1 and ranks[3:] == [1, 1, 1]
    for query in shown["from_image"]:
        order = np.argsort(-cosines[:, query["picture"]]).tolist()
        assert [caption for caption, _, _ in query["found"]] == [texts_of[n] for n in order[:5]]
        assert [right for _, _, right in query["found"]] == [owner[n] == query["picture"] for n in order[:5]]
    write_report(tmp_path / "page.html", "T", [], [result])
    page = Page(tmp_path / "page.html")
    assert "i" not in page.tags and any("<i>image" in text for text in page.texts)


def test_a_result_of_imagenets_size_makes_a_small_page(tmp_path, monkeypatch):
    """1,000 classes: the worst stand open, the others in a list that can be opened; photographs are JPEGs."""

    class Photos(Pictures):
        def __getitem__(self, index):
            pixels = np.random.default_rng(index).integers(0, 256, (300, 400, 3), dtype=np.uint8)
            return Example(Image.fromarray(pixels), label=index % 1000)

        def __len__(self):
            return 5000

    labels = np.arange(5000) % 1000
    result = scored(labels, (labels + (np.arange(5000) % 7 == 0)) % 1000, 1000)
    result = dataclasses.replace(result, dataset=dataclasses.replace(result.dataset, source=Photos(1000)))
    write_report(tmp_path / "page.html", "T", [], [result])
    page = Page(tmp_path / "page.html")
    assert "The other 980" in page.texts and page.texts.count("Accuracy of each class") == 1
    assert {source.partition(";")[0] for source in page.sources} == {"data:image/jpeg"}
    assert len(page.sources) == 12 + 8 + 2 * 8 + 8
    assert (tmp_path / "page.html").stat().st_size < 2**20  # noise is what compresses worst


def test_what_is_reported_imports_no_report():
    program = "import sys, clip_jax.evaluation.zero_shot; print('jinja2' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
