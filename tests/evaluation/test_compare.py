"""Models side by side, from files of evaluate.py and of CLIP_benchmark."""

import json
import subprocess
import sys

import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation.compare import main
from clip_jax.evaluation.comparison import compare
from tests.evaluation.test_rows import OF_CLIP_BENCHMARK
from tests.reports.test_evaluation_report import Page

OURS = [
    {"dataset": name, "model": "ViT-B/32", "pretrained": "runs/mine", "task": "zeroshot_classification",
     "language": "en", "metrics": metrics, "main_metric": main, "classes": classes, "templates": 1}
    for name, metrics, main, classes in (
        ("pets", {"acc1": 0.8, "acc5": 0.9, "mean_per_class_recall": 0.8}, "mean_per_class_recall", 37),
        ("<b>own", {"acc1": 0.5, "mean_per_class_recall": 0.25}, "acc1", 4),
    )
]  # fmt: skip
OTHER = {**OURS[1], "model": "other", "metrics": {"acc1": 0.75}, "classes": 5}
CAPTIONS = {**OURS[0], "dataset": "coco", "task": "zeroshot_retrieval", "metrics": {"image_retrieval_median_rank": 4.0}}


@pytest.fixture
def write(tmp_path):
    def write(*contents):
        paths = [str(tmp_path / f"{number}.json") for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            with open(path, "w") as file:
                json.dump(content, file)
        return paths

    return write


def values(comparison):
    return {(line.dataset, line.metric): line.values for line in comparison.lines}


def test_rows_are_matched_by_data_set_and_task(write):
    found = compare(write(OURS, OF_CLIP_BENCHMARK, [OTHER]))
    assert found.models == ("ViT-B/32", "ViT-B-32", "other")
    assert values(found) == {
        ("pets", "acc1"): (0.8, 0.87, None),
        ("pets", "acc5"): (0.9, 0.99, None),
        ("pets", "mean_per_class_recall"): (0.8, 0.868, None),
        ("<b>own", "acc1"): (0.5, None, 0.75),
        ("<b>own", "mean_per_class_recall"): (0.25, None, None),
    }
    assert [(line.dataset, line.metric) for line in found.lines if line.is_main] == [
        ("pets", "mean_per_class_recall"), ("<b>own", "acc1"),
    ]  # fmt: skip
    assert [line.paper for line in found.lines if line.paper != (None,) * 3] == [(0.87, 0.87, None)]
    assert found.notes == (
        "<b>own, zeroshot_classification: classes differs: 4 of ViT-B/32, 5 of other",
        "<b>own, zeroshot_classification: other has no mean_per_class_recall",
    )


def test_what_a_model_is_judged_by_is_known_without_being_written(write):
    found = compare(write(OF_CLIP_BENCHMARK, {**OF_CLIP_BENCHMARK, "pretrained": "laion2b"}))
    assert found.models == ("ViT-B-32 (openai)", "ViT-B-32 (laion2b)")
    assert [line.metric for line in found.lines if line.is_main] == ["mean_per_class_recall"]
    assert found.in_paper() == [0]


def test_a_model_before_and_after_is_told_apart_by_the_files(write):
    paths = write(OURS, [{**OURS[0], "metrics": {"acc1": 0.9}}], OTHER)
    found = compare(paths)
    assert found.models == (f"ViT-B/32 ({paths[0]})", f"ViT-B/32 ({paths[1]})", "other")
    assert values(found)["pets", "acc1"] == (0.8, 0.9, None)
    with pytest.raises(UserError, match=r"0.json is named twice"):
        compare([*paths, paths[0]])


def test_rows_of_a_model_can_be_in_several_files(write):
    assert compare(write(OURS[0], OURS[1], OTHER)).models == ("ViT-B/32", "other")


def test_other_languages_are_other_rows(write):
    italian = {**OF_CLIP_BENCHMARK, "language": "it"}
    found = compare(write([OF_CLIP_BENCHMARK, italian], [{**italian, "model": "other"}]))
    assert {line.dataset for line in found.lines} == {"pets", "pets (it)"}
    assert {line.paper for line in found.lines if line.dataset == "pets (it)"} == {(None, None)}


@pytest.mark.parametrize(
    "contents, message",
    [
        ([OURS], "expected results of at least two models, got only of ViT-B/32"),
        ([[*OURS, OURS[0]], [OTHER]], r"0.json has pets, zeroshot_classification of ViT-B/32 \(runs/mine\) twice"),
        ([[OF_CLIP_BENCHMARK, {**OF_CLIP_BENCHMARK, "dataset": "pets"}]], "0.json has pets, .* twice"),
        ([OURS[0], OTHER], "no data set and task of ViT-B/32, other is the same"),
        ([OURS, {"hello": 1}], "1.json, result 1 needs a value for dataset"),
        ([OURS, 7], "1.json, result 1 must hold the fields"),
    ],
)
def test_mistakes_are_named(contents, message, write):
    with pytest.raises(UserError, match=message):
        compare(write(*contents))


def test_the_table_and_the_page(write, tmp_path, capsys):
    other = {**CAPTIONS, "model": "other", "metrics": {"image_retrieval_median_rank": 6.0}}
    main([*write([*OURS, CAPTIONS], [OTHER, other]), "--report", str(tmp_path / "new" / "page.html")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "data",
        "set",
        "task",
        "metric",
        "ViT-B/32",
        "other",
        "difference",
        "paper,",
        "ViT-B/32",
    ]
    cells = {tuple(line.split()[:3:2]): line.split()[3:] for line in lines[1:]}
    assert cells["pets", "mean_per_class_recall"] == ["0.8000", "-", "-", "0.8700"]
    assert cells["<b>own", "acc1"] == ["0.5000", "0.7500", "+0.2500", "-"]
    assert cells["coco", "image_retrieval_median_rank"] == ["4", "6", "+2", "-"]
    assert [line for line in lines if line.startswith("note: ")] and lines[-1].startswith("report: ")
    page = Page(tmp_path / "new" / "page.html")
    assert "b" not in page.tags and "<b>own" in page.texts and len(page.sources) == 1
    html = (tmp_path / "new" / "page.html").read_text()
    assert '<td class="right">+0.2500</td>' in html and '<td class="wrong">+2</td>' in html
    assert html.count('class="best"') == 2  # 0.75 of acc1, and rank 4


def test_from_the_shell_a_mistake_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"dataset": "x", "metrics": {"acc5": NaN}}')
    command = [sys.executable, "-m", "clip_jax.evaluation.compare", str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/a.json: expected strict JSON") and done.stderr.count("\n") == 1
