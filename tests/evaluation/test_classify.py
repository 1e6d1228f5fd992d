"""The one-line classifier against OpenAI's own model class."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from clip_jax import tokenize
from clip_jax.errors import UserError
from clip_jax.processing import Preprocess
from evaluate import main
from tests import reference_models
from tests.evaluation.test_retrieval import CONFIG

LABELS = ("a cup", "not a cup", "a diagram", "seven dogs", "snow", "a café")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    model, path = reference_models.random_openai_model(CONFIG), tmp_path_factory.mktemp("weights") / "openai.pt"
    reference_models.save_torchscript(model, CONFIG, path)
    return model, str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [str(folder / f"{number}.png") for number in range(3)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    return paths


def test_probabilities_are_those_of_openais_notebook(reference, images, tmp_path, capsys):
    model, path = reference
    report = tmp_path / "page.html"
    main(["--weights", path, "--images", *images, "--labels", ",".join(LABELS), "--report", str(report)])
    preprocess = Preprocess.from_config(CONFIG)
    pixels = torch.from_numpy(np.stack([preprocess(Image.open(image)) for image in images])).permute(0, 3, 1, 2)
    tokens = torch.from_numpy(tokenize(LABELS, CONFIG.text.context_length))
    with torch.no_grad():
        expected = model(pixels, tokens)[0].softmax(dim=-1).numpy()
    *lines, said = capsys.readouterr().out.splitlines()
    assert said == f"report: {report}" and len(lines) == len(images)
    for line, image, own in zip(lines, images, expected, strict=True):
        path_said, _, rest = line.partition(": ")
        found = dict(re.findall(r"(\S.*?) ([\d.]+)%(?:, |$)", rest))
        best = sorted(range(len(LABELS)), key=lambda label: -own[label])[:5]
        assert path_said == image and list(found) == [LABELS[label] for label in best]
        for label in best:
            assert abs(float(found[LABELS[label]]) - 100 * own[label]) < 0.11
    html = report.read_text()
    assert html.count("data:image/png") == len(images) and "a café" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere.png", "--labels", "a,b"], "nowhere.png: expected a readable image"),
        (["--images", "{image}"], "expected at least two labels, as in --labels 'a cup,not a cup'; got"),
        (["--images", "{image}", "--labels", "a cup"], "expected at least two labels"),
        (["--images", "{image}", "--labels", "a,b,a"], "the label 'a' comes twice"),
        (["--labels", "a,b"], "--labels goes with --images"),
        (["--images", "{image}", "--labels", "a,b", "--datasets", "digits"], "and neither with --datasets"),
    ],
)
def test_mistakes_are_named(reference, images, arguments, message):
    with pytest.raises(UserError, match=message):
        main(["--weights", reference[1], *(argument.format(image=images[0]) for argument in arguments)])
