"""The examples run from top to bottom and show what they promise; their pages hold the same cells."""

import json
import re

import jax
import matplotlib
import pytest

from clip_jax import cli, options
from clip_jax.errors import UserError
from clip_jax.evaluation import few_shot
from clip_jax.planner import compile
from clip_jax.training.config import RunConfig
from examples import pages, stand_in

NOTEBOOKS = {notebook.stem: notebook for notebook in pages.notebooks()}


@pytest.fixture(scope="module", autouse=True)
def small_stand_in(one_device):
    """No download, and a stand-in that is trained in seconds; no windows."""

    def unreachable(name, **_):
        raise UserError(f"cannot download {name}")

    model = {
        "embed_dim": 32,
        "vision": {**stand_in.MODEL["vision"], "image_resolution": 32, "width": 64, "layers": 2, "mlp_width": 128},
        "text": {"width": 32, "heads": 1, "mlp_width": 64, "layers": 1},
    }
    less = {"model": model, "total_steps": 80, "unroll": 1, "checkpoint_every": 80}
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in, "fetch", unreachable)
        patch.setattr(stand_in, "RECIPE", {**stand_in.RECIPE, **less, "augment": {"crop": "resized"}})
        yield
    matplotlib.use(backend)


def run(name, **parameters):
    """The namespace of a notebook after its last cell, all it printed, and its figures."""
    done = pages.execute(NOTEBOOKS[name], parameters)
    texts, figures = zip(*((output.text, output.figures) for output in done.outputs), strict=True)
    assert " object at 0x" not in "".join(texts), "a cell ends with a value that nobody wants to see"
    return done.namespace, "".join(texts), [figure for shown in figures for figure in shown]


def test_official_weights_come_first(monkeypatch, capsys):
    monkeypatch.setattr(stand_in, "fetch", lambda name, **_: name)
    assert stand_in.weights("RN50") == "RN50"
    assert capsys.readouterr().out == "The model is OpenAI's RN50.\n"


def test_each_photograph_and_its_sentence_find_each_other():
    values, text, figures = run("1_photographs")
    assert "a stand-in that knows 24 photographs" in text
    assert values["cosines"].shape == (8, 8)
    assert "8 of 8 sentences" in text and "8 of 8 photographs" in text
    assert len(figures) == 1


def test_class_names_classify_photographs():
    values, text, figures = run("2_class_names")
    assert text.count("100 classes, from apple") == 1
    best = [values["class_names"][number] for number in values["probabilities"].argmax(axis=1)]
    assert best[:3] == ["rocket", "motorcycle", "cup"]
    assert len(figures) == 1


def test_the_sentence_that_fits_a_portrait():
    values, text, figures = run("3_portrait")
    first, second = (float(share) for share in re.findall(r"([\d.]+)%", text))
    assert first > 90 and first + second == pytest.approx(100, abs=0.1)
    assert values["matters"].max() > 0.1  # some part of it matters
    assert len(figures) == 1


def test_a_folder_of_cups_before_and_after():
    values, text, figures = run("4_cups", count=20, epochs=3)
    assert list(values["accuracies"])[:3] == ["before, zero-shot", "before, linear probe", "fine-tuned"]
    assert values["accuracies"]["fine-tuned"] > 0.7
    assert re.search(r"fine-tuned +[01]\.\d{4}", text) and (values["workdir"] / "report.html").exists()
    assert len(figures) == 2


def test_more_shots_are_better(monkeypatch):
    monkeypatch.setattr(few_shot, "SHOTS", (1, 8))
    values, text, figures = run("5_few_shot")
    one, eight = values["result"].accuracies.mean(axis=1)
    assert 0.1 < one < eight  # of ten classes
    assert f"8 shots    {100 * eight:5.1f}%" in text
    assert len(figures) == 1


def test_a_plan(monkeypatch):
    """With a CPU device in the slice's place, as the planner's own tests have it."""
    devices = type("Topology", (), {"devices": jax.devices()})
    monkeypatch.setattr(cli, "load_config", lambda name: options.from_dict(RunConfig, stand_in.RECIPE, name))
    monkeypatch.setattr(compile, "use_compiler_only", lambda: None)
    monkeypatch.setattr(compile.topologies, "get_topology_desc", lambda **_: devices)
    values, text, figures = run("6_pod", config_name="small", slice_name="v5e-1")
    assert "stand_in on v5e-1: 1 chips" in text and "peak, alive at once" in text
    assert len(values["plans"]) == 10 and values["plans"][0]["model"] == "stand_in"
    assert len(figures) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_page_has_the_cells_of_its_notebook(name):
    page = (pages.PAGES / f"{name}.md").read_text()
    expected = [pages.as_markdown(kind, text) for kind, text, _ in pages.cells(NOTEBOOKS[name])]
    # Without what was printed and drawn, and the first and last lines, the page is its cells.
    found = re.sub(r"```text\n.*?\n```\n\n|!\[\]\(.*?\)\n\n|\A<!--.*?-->\n\n", "", page, flags=re.DOTALL)
    assert found.rpartition("\n\n")[0] == "\n\n".join(expected), "run `make examples`"
    for figure in re.findall(r"!\[\]\((.*?)\)", page):
        assert (pages.PAGES / figure).stat().st_size < 100_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name):
    for cell in json.loads(NOTEBOOKS[name].read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
