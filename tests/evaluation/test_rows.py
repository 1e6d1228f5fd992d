"""What is written of an evaluation: a table, strict JSON and CSV, read back."""

import csv
import json
import math

import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation.datasets import EvaluationSet
from clip_jax.evaluation.retrieval import RetrievalResult
from clip_jax.evaluation.rows import Row, read_rows, row_of, table, write_rows
from clip_jax.evaluation.zero_shot import ZeroShotResult
from tests.evaluation.test_features import Pictures

# As CLIP_benchmark's cli.py dumps it, for each run one object.
OF_CLIP_BENCHMARK = {
    "dataset": "wds/vtab/pets",
    "model": "ViT-B-32",
    "pretrained": "openai",
    "task": "zeroshot_classification",
    "metrics": {"acc1": 0.87, "acc5": 0.99, "mean_per_class_recall": 0.868},
    "language": "en",
}


def pets():
    scores, labels = np.eye(37, dtype=np.float32)[np.arange(10) % 37], np.array([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    names = tuple(f"pet {number}" for number in range(37))
    return ZeroShotResult(EvaluationSet("pets", Pictures(), names, ("a {}",), "mean_per_class_recall"), scores, labels)


def photos():
    features = np.eye(7, 8, dtype=np.float32)
    return RetrievalResult(EvaluationSet("photos", Pictures()), features, features, np.arange(7))


def rows():
    return [row_of(result, "ViT-B/32", "runs/mine") for result in (pets(), photos())]


def test_the_table_has_measured_paper_and_difference():
    lines = table(rows()).splitlines()
    assert lines[0].split("  ")[0] == "data set" and len({line.index("zeroshot_") for line in lines[1:]}) == 1
    cells = {tuple(line.split()[1:3]): line.split()[3:] for line in lines[1:]}
    own = pets().metrics["mean_per_class_recall"]
    measured, paper, difference = cells["zeroshot_classification", "mean_per_class_recall"]
    assert (measured, paper) == (f"{own:.4f}", "0.8700") and difference == f"{own - 0.87:+.4f}"
    assert cells["zeroshot_classification", "acc1"] == ["0.7000"]
    assert cells["zeroshot_retrieval", "image_retrieval_median_rank"] == ["1"]
    assert len(lines) == 1 + 3 + len(photos().metrics)
    assert len({len(line) for line in lines if "0.8700" in line or line.endswith("difference")}) == 1


def test_json_is_read_back(tmp_path):
    write_rows(tmp_path / "rows.json", rows())
    assert read_rows(tmp_path / "rows.json") == rows()
    classified, retrieved = json.loads((tmp_path / "rows.json").read_text())
    assert list(classified) == ["dataset", "model", "pretrained", "task", "language", "metrics", "main_metric",
                                "classes", "templates"]  # fmt: skip
    assert (classified["main_metric"], classified["classes"], classified["templates"]) == (
        "mean_per_class_recall",
        37,
        1,
    )
    assert "main_metric" not in retrieved


def test_csv_has_a_column_for_each_metric(tmp_path):
    write_rows(tmp_path / "rows.CSV", rows())
    with open(tmp_path / "rows.CSV", newline="") as file:
        classified, retrieved = csv.DictReader(file)
    assert list(classified)[:5] == ["dataset", "model", "task", "pretrained", "language"]
    assert float(classified["acc1"]) == 0.7 and classified["image_retrieval_recall@1"] == ""
    assert {name: float(retrieved[name]) for name in photos().metrics} == photos().metrics
    assert (retrieved["acc1"], retrieved["classes"], classified["classes"]) == ("", "", "37")


@pytest.mark.parametrize("form", ["object", "list", "more keys"])
def test_what_clip_benchmark_writes_is_read(form, tmp_path):
    more = {"model_fullname": "ViT-B-32 openai", "x": [None]} if form == "more keys" else {}
    metrics = {**OF_CLIP_BENCHMARK["metrics"], "normalized": True, "note": "x", "epochs": 10} if more else {}
    content = {**OF_CLIP_BENCHMARK, **more, **({"metrics": metrics} if metrics else {})}
    (tmp_path / "run.json").write_text(json.dumps([content] if form == "list" else content))
    (row,) = read_rows(tmp_path / "run.json")
    extra = {"epochs": 10.0} if more else {}
    assert row == Row("wds/vtab/pets", "ViT-B-32", "zeroshot_classification",
                      {**OF_CLIP_BENCHMARK["metrics"], **extra}, "openai")  # fmt: skip
    assert row.paper == {"mean_per_class_recall": 0.87}


def changed(**values):
    return json.dumps({**OF_CLIP_BENCHMARK, **values})


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "run.json is no JSON"),
        ("\0\1", "run.json is no JSON"),
        ("[" * 100_000, "run.json is no JSON"),
        ("[]", "run.json has no results"),
        ("3", "run.json, result 1 must hold the fields"),
        ("[[]]", "result 1 must hold the fields"),
        ("{}", "result 1 needs a value for dataset"),
        (changed(metrics=None), "result 1: metrics must be of type mapping"),
        (changed(dataset=["x"]), "result 1: dataset must be of type str"),
        (f"[{changed()}, {changed(task=1)}]", "result 2: task must be of type str"),
        (changed(metrics={"acc5": math.nan}), "run.json: expected strict JSON with finite numbers, got NaN"),
        (changed(metrics={"acc5": -math.inf}), "got -Infinity"),
        (changed(metrics={"acc5": 1}).replace('"acc5": 1', '"acc5": 1e999'), "expected a finite acc5, got inf"),
        (changed(metrics={"acc5": 10**400}), "result 1"),
        (changed(dataset="\x1b[2J"), "result 1: expected names of at most 1000 printable letters, got"),
        (changed(metrics={"acc\n": 1}), "result 1: expected names"),
        (changed(model="m" * 10_000), "result 1: expected names"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_rows(tmp_path / "run.json")
    assert len(str(error.value)) < 1000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.json cannot be read"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(UserError, match="is not a file"):
        read_rows(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_an_error(value):
    with pytest.raises(UserError, match="mine, zeroshot_classification: expected a finite acc1, got"):
        Row("mine", "m", "zeroshot_classification", {"acc1": value})
