"""The one command, from class folders and from captions: what it prints, writes and shows, and what it refuses."""

import dataclasses
import json
import logging
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import train
from clip_jax import interpolate, model_folder
from clip_jax.data.folder import open_divided
from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import evaluation_set
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.zero_shot import zero_shot
from clip_jax.judged_run import Evaluation
from clip_jax.models import CLIP
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.training.config import make_training
from clip_jax.weights import load_variables
from clip_jax.workdir import read_metrics
from tests import tiny
from tests.reports.test_evaluation_report import Page
from tests.training.test_run import CONFIG

pytestmark = pytest.mark.usefixtures("one_device")

MODELS = ["before, zero-shot", "before, linear probe", "fine-tuned", "WiSE-FT, alpha 0.5"]


def write_photos(root, shades, captions=False):
    """12 noisy images of each shade, in a folder for each or with a caption each."""
    generator = np.random.default_rng(0)
    for name, shade in shades.items():
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.clip(generator.normal(shade, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
            if captions:
                (root / name / f"{number}.txt").write_text(f"{name} number {number}")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, and a model to start from."""
    root = tmp_path_factory.mktemp("one_command")
    write_photos(root / "photos", {"dark_cups": 70, "cups": 180})
    write_photos(root / "others", {"grey": 128, "black": 10})
    write_photos(root / "captioned", {"dark": 70, "light": 180}, captions=True)
    model_folder.write(root / "model", CONFIG.model, tiny.telling_variables(CONFIG.model))
    return root


def command(root, photos, workdir, *more):
    train.main(
        [
            "--config=finetune",
            f"--workdir={root / workdir}",
            f"--config.init_from={root / 'model'}",
            f"--config.data.folder.path={root / photos}",
            "--config.optimizer.learning_rate=1e-2",
            "--config.batch_size=16",
            "--config.epochs=3",
            "--config.ema_decay=0.5",  # in all runs, so that one program serves them
            *more,
        ]
    )


@pytest.fixture(scope="module")
def cups(root):
    """What a whole run on class folders prints and logs."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("clip_jax")
    logger.addHandler(handler)
    level, _ = logger.level, logger.setLevel(logging.INFO)
    command(root, "photos", "cups", f"--config.eval_datasets={root / 'others'}")
    logger.setLevel(level)
    logger.removeHandler(handler)
    return lines


def rows(workdir):
    return {
        (row["model"], row["dataset"]): row["metrics"] for row in json.loads((workdir / "results.json").read_text())
    }


def test_it_says_what_the_split_is_and_how_long_it_will_take(root, cups):
    said = "\n".join(cups)
    assert "24 images of 2 classes (cups 12, dark_cups 12), captions 'a photo of a {}.'; 20 to train on, 4" in said
    assert re.search(
        r"about \d+ s on this machine, reading and compiling aside: 4 steps of 16; cheaper: a frozen", said
    )
    steps = [line["step"] for line in read_metrics(root / "cups") if "eval/folder/acc1" in line]
    assert steps == [0, 2, 4]


def test_before_and_after_are_what_was_measured_on_the_way(root, cups):
    lines = {line["step"]: line for line in read_metrics(root / "cups") if "eval/folder/acc1" in line}
    got = rows(root / "cups")
    for name in ("folder", str(root / "others")):
        assert got["before, zero-shot", name]["acc1"] == lines[0][f"eval/{name}/acc1"]
        assert got["fine-tuned", name]["acc1"] == lines[4][f"eval/{name}/acc1"]
        assert got["fine-tuned, average of its weights", name]["acc1"] == lines[4][f"eval_ema/{name}/acc1"]
    assert got["before, linear probe", "folder"]["lp_acc1"] == 1.0  # it is dark or light
    assert {model for model, _ in got} == {*MODELS, "fine-tuned, average of its weights"}


def test_the_mean_of_both_models_is_what_interpolate_writes_and_its_curve_ends_at_both(root, cups, tmp_path, capsys):
    before, after, held_out = str(root / "cups" / "start"), str(root / "cups"), f"held_out:{root / 'cups'}"
    interpolate.main([before, after, str(tmp_path / "half")])
    config, variables = load_variables(tmp_path / "half")
    dataset = evaluation_set(held_out)
    encoders = make_encoders(CLIP(config), make_partitioner(MeshConfig()))
    got = rows(root / "cups")
    result = zero_shot(encoders, variables, dataset, progress=False)
    assert result.metrics == got["WiSE-FT, alpha 0.5", "folder"]
    files = [f"--output={tmp_path / 'curve.json'}", f"--report={tmp_path / 'curve.html'}"]
    interpolate.main([before, after, f"--datasets={held_out},{root / 'others'}", *files])
    curve = json.loads((tmp_path / "curve.json").read_text())
    at = {(row["model"], row["dataset"]): row["metrics"] for row in curve}
    assert len(at) == 22
    for alpha, model in (("0", "before, zero-shot"), ("0.5", "WiSE-FT, alpha 0.5"), ("1", "fine-tuned")):
        assert at[f"alpha {alpha}", held_out] == got[model, "folder"]
        assert at[f"alpha {alpha}", str(root / "others")] == got[model, str(root / "others")]
    assert len(re.findall(r"(?m)^ +0\.\d ", capsys.readouterr().out)) == 9
    assert len(Page(tmp_path / "curve.html").sources) == 1


def test_the_page_shows_each_picture_that_changed(root, cups):
    page = (root / "cups" / "report.html").read_text()
    better, worse = (
        int(re.search(rf"(\d+) from {words}", page).group(1)) for words in ("wrong to right", "right to wrong")
    )
    assert page.count("before: ") >= better + worse  # two data sets
    assert page.count("<img") == 1 + page.count("before: ")
    for model in MODELS:
        assert f"<td>{model}</td>" in page


def test_the_same_command_again_changes_nothing(root, cups):
    before = [(root / "cups" / name).read_bytes() for name in ("metrics.jsonl", "results.json", "held_out.json")]
    command(root, "photos", "cups", f"--config.eval_datasets={root / 'others'}")
    assert before == [
        (root / "cups" / name).read_bytes() for name in ("metrics.jsonl", "results.json", "held_out.json")
    ]


def test_what_is_held_out_opens_by_the_workdir_as_long_as_it_is_that(root, cups, tmp_path):
    dataset = evaluation_set(f"held_out:{root / 'cups'}")
    assert (len(dataset.source), len(dataset.train())) == (4, 20)
    assert dataset.class_names == ("cups", "dark cups") and dataset.templates == ("a photo of a {}.",)
    with pytest.raises(UserError, match=r"has no held_out\.json: expected the workdir of a run"):
        evaluation_set(f"held_out:{tmp_path}")
    photo = root / "photos" / "cups" / "0.png"
    photo.rename(root / "photos" / "cups" / "zero.png")
    open_divided.cache_clear()
    with pytest.raises(UserError, match=r"are not those that the run in .* began with"):
        evaluation_set(f"held_out:{root / 'cups'}")
    (root / "photos" / "cups" / "zero.png").rename(photo)
    open_divided.cache_clear()


def test_captions_are_found_by_the_same_command(root, capsys):
    command(root, "captioned", "captions")
    key = "eval/folder/image_retrieval_recall@1"
    lines = [line for line in read_metrics(root / "captions") if key in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    got = rows(root / "captions")
    assert got["fine-tuned", "folder"]["image_retrieval_recall@1"] == lines[-1][key]
    assert "folder/image_retrieval_recall@1" in capsys.readouterr().out
    page = (root / "captions" / "report.html").read_text()
    assert "captions that look for their image" in page and "linear probe</td>" not in page


def test_two_data_sets_of_one_name_are_refused_as_one_would_hide_the_other(root):
    digits = {"kind": "folder", "path": str(root / "photos"), "held_out": 0.2}
    with pytest.raises(UserError, match="two data sets to judge by are called digits, so their results would be one"):
        Evaluation(dataclasses.replace(CONFIG, data={"digits": digits}), make_training(CONFIG))


def test_an_unreadable_image_is_named_before_the_first_step(root, tmp_path):
    shutil.copytree(root / "photos", tmp_path / "photos")
    for name in json.loads((root / "cups" / "held_out.json").read_text())["folder"]["held_out"]:
        (tmp_path / "photos" / name).write_bytes(b"no image")
    shutil.copytree(root / "model", tmp_path / "model")
    with pytest.raises(UserError, match=r"\.png.*"):
        command(tmp_path, "photos", "run")
