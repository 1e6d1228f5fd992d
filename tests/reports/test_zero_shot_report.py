import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from clip_jax.data.example import Example
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.zero_shot import ZeroShotResult
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
    wrong = int((result.scores.argmax(axis=1) != result.labels).sum())
    samples = min(wrong, 4) + 10 - wrong  # a third of the twelve places at most are for mistakes
    assert len(page.sources) == samples + 3 + 2  # and a picture a class, the loss curve, the confusion
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


def test_what_is_reported_imports_no_report():
    program = "import sys, clip_jax.evaluation.zero_shot; print('jinja2' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
