"""Names and templates: whose they are, and what is refused."""

import dataclasses
import json
from importlib.metadata import PackageNotFoundError

import numpy as np
import optax
import pytest
from PIL import Image

import evaluate
from clip_jax.data.access import Access
from clip_jax.errors import UserError
from clip_jax.evaluation import prompts
from clip_jax.evaluation.datasets import evaluation_set
from clip_jax.evaluation.encoders import make_encoders
from clip_jax.evaluation.registry import Entry
from clip_jax.judged_run import Evaluation
from clip_jax.models import CLIP, CLIPConfig, TextConfig
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.training.config import RunConfig
from clip_jax.training.state import Training
from clip_jax.weights import save
from tests import tiny
from tests.evaluation.generated_sets import LISTED, names_in_the_collection, words, write_wds


@pytest.fixture
def weights(tmp_path):
    config = CLIPConfig(32, tiny.VIT.vision, TextConfig(32, 2, 64, 1, context_length=32))
    save(tmp_path / "tiny", config, tiny.variables(config), "jax")
    return str(tmp_path / "tiny")


def write_classes(folder, names):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(folder / name / "1.png")
    return str(folder)


def test_the_name_of_a_class_is_put_in_and_nothing_else_is_read_into_a_template():
    assert prompts.prompt("a {c}, {} and {0.__class__} of {x}", "dog {}") == "a dog {}, dog {} and {0.__class__} of {x}"


@pytest.mark.parametrize(
    "label, name",
    [
        ("/a/airplane_cabin", "airplane cabin"),
        ("/b/bow_window/indoor", "bow window indoor"),
        ("ApplyEyeMakeup", "Apply Eye Makeup"),
        ("apple_pie", "apple pie"),
        ("Chevrolet TrailBlazer SS 2009", "Chevrolet TrailBlazer SS 2009"),
        ("Ram C/V Cargo Van Minivan 2012", "Ram C/V Cargo Van Minivan 2012"),
    ],
)
def test_labels_become_readable(label, name):
    assert prompts.readable(label) == name


@pytest.mark.parametrize("labels", [("0", "1"), ("class_0", "class_17"), ("n01440764", "n99999999"), ("id-1", "Id 2")])
def test_labels_that_look_like_ids_are_refused(labels, tmp_path):
    path = write_classes(tmp_path / "set", labels)
    with pytest.raises(UserError, match=r"no caption says: name them|otherwise than expected"):
        evaluation_set(path)
    assert evaluation_set(path, class_names=("cat", "dog")).class_names == ("cat", "dog")


@pytest.mark.parametrize("labels", [("dog", "7"), ("747", "A320 neo"), ("cat", "dog")])
def test_labels_with_a_word_among_them_are_names(labels, tmp_path):
    assert set(evaluation_set(write_classes(tmp_path / "set", labels)).class_names) == set(labels)


def test_folders_of_imagenets_ids_get_clips_names(tmp_path):
    path = write_classes(tmp_path / "set", ("n02012849", "n01440764"))
    assert evaluation_set(path).class_names == ("tench", "crane bird")


def test_a_set_that_is_prepared_with_numbers_for_names_is_refused(tmp_path, monkeypatch):
    path = write_classes(tmp_path / "folder_cifar10", [str(number) for number in range(10)])
    with pytest.raises(UserError, match=r"folder_cifar10 are called '0', '9' and so on, which no caption says"):
        evaluation_set("cifar10", Access(str(tmp_path)))
    assert path == str(tmp_path / "folder_cifar10")


def test_another_number_of_classes_is_an_error(tmp_path):
    folder = write_wds(tmp_path, "cifar10")
    (folder / "classnames.txt").write_text("\n".join(words(9)))
    with pytest.raises(UserError, match="expected the names of 10 classes, got 9"):
        evaluation_set("cifar10", Access(str(tmp_path)))
    with pytest.raises(UserError, match="has 9 classes, but --class_names names 10"):
        evaluation_set("cifar10", Access(str(tmp_path)), class_names=words(10))
    (folder / "classnames.txt").unlink()
    with pytest.raises(UserError, match="expected the names of 10 classes, got 0"):
        evaluation_set("cifar10", Access(str(tmp_path)))
    assert evaluation_set("cifar10", Access(str(tmp_path)), class_names=words(10)).class_names == tuple(words(10))


def test_a_sets_own_words_come_before_the_listed_ones(tmp_path):
    folder = write_wds(tmp_path, "pets")
    (folder / "classnames.txt").write_text("\n".join(words(37)))
    (folder / "zeroshot_classification_templates.txt").write_text("this is {c}\nthat is {c}\n")
    dataset = evaluation_set("pets", Access(str(tmp_path)))
    assert (dataset.class_names, dataset.templates) == (tuple(words(37)), ("this is {c}", "that is {c}"))
    (folder / "zeroshot_classification_templates.txt").unlink()
    assert evaluation_set("pets", Access(str(tmp_path))).templates == ("a photo of a {c}, a type of pet.",)
    (folder / "zeroshot_classification_templates.txt").write_text("this is it")
    with pytest.raises(UserError, match=r"'this is it' has no {} where the name of the class goes"):
        evaluation_set("pets", Access(str(tmp_path)))


def test_a_folder_of_the_collection_by_its_path(tmp_path):
    folder = write_wds(tmp_path, "mnist")
    for path in (folder, folder / "test"):
        dataset = evaluation_set(str(path))
        assert dataset.class_names == tuple("0123456789") and len(dataset.source) == 6
        assert [dataset.source[index].label for index in range(6)] == [0, 4, 8, 7, 1, 5]


def test_without_the_lists_it_is_said_where_they_are(tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    folder = write_wds(tmp_path, "pets")
    dataset = evaluation_set("pets", Access(str(tmp_path)))
    prompts._listed.cache_clear()
    monkeypatch.setattr(prompts, "distribution", missing)
    assert evaluation_set("pets", Access(str(tmp_path))).class_names == dataset.class_names
    (folder / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(UserError, match=r"pip install --no-deps -r requirements-prompts.txt, or name them with"):
        evaluation_set("pets", Access(str(tmp_path)))
    evaluation_set("digits")


def test_templates_from_the_command_line(tmp_path):
    assert prompts.templates_from("a drawing of a {}") == ("a drawing of a {}",)
    (tmp_path / "templates.txt").write_text("one {}\n\n two {c} \n")
    assert prompts.templates_from(str(tmp_path / "templates.txt")) == ("one {}", "two {c}")
    (tmp_path / "templates.txt").write_text("\n")
    with pytest.raises(UserError, match="has no template"):
        prompts.templates_from(str(tmp_path / "templates.txt"))
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read"):
        prompts.templates_from("nowhere.txt")


def test_names_and_templates_of_ones_own(weights, tmp_path):
    path = write_classes(tmp_path / "set", ("1", "2", "3"))
    (tmp_path / "names.txt").write_text("a cat\na dog\na bird\n")
    flags = [
        "--class_names",
        str(tmp_path / "names.txt"),
        "--templates",
        "it is {}",
        "--output",
        str(tmp_path / "o.json"),
    ]
    assert evaluate.main(["--weights", weights, "--datasets", path, *flags]) == 0
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert (row["classes"], row["templates"], row["main_metric"]) == (3, 1, "acc1")
    with pytest.raises(UserError, match="one data set, but --datasets has 27"):
        evaluate.main(["--weights", weights, "--datasets", "paper27", *flags])


def test_one_broken_set_of_several_is_reported_and_the_others_run(weights, tmp_path, capsys):
    good = write_classes(tmp_path / "good", ("cat", "dog"))
    long = write_classes(tmp_path / "long", ("cat", "word " * 40))
    damaged = write_classes(tmp_path / "damaged", ("cat", "dog"))
    (tmp_path / "damaged" / "cat" / "1.png").write_bytes(b"no picture")
    names = [str(tmp_path / "none"), long, damaged, good]
    command = ["--weights", weights, "--output", str(tmp_path / "o.json"), "--datasets"]
    assert evaluate.main([*command, ",".join(names)]) == 1
    assert [row["dataset"] for row in json.loads((tmp_path / "o.json").read_text())] == [good]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert [line.split(": ")[1] for line in errors] == names[:3]
    for name in names[:3]:
        with pytest.raises(UserError):
            evaluate.main([*command, name])


def test_a_task_that_does_not_suit_a_set_does_not_cost_the_others(weights, tmp_path, capsys):
    """A class folder has no training split, which a linear probe needs."""
    sets = [write_classes(tmp_path / name, ("cat", "dog")) for name in ("one", "other")]
    command = ["--weights", weights, "--output", str(tmp_path / "o.json"), "--tasks", "zeroshot,linear_probe"]
    assert evaluate.main([*command, "--datasets", ",".join(sets)]) == 1
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [(row["dataset"], row["task"]) for row in rows] == [(name, "zeroshot_classification") for name in sets]
    assert capsys.readouterr().err.count("which linear_probe needs") == 2


def test_prompts_of_all_sets_are_checked_before_anything_is_computed(weights, tmp_path, monkeypatch, capsys):
    def compute(*_):
        raise UserError("computed")

    def spied(model, partitioner):
        encoders = make_encoders(model, partitioner)
        refusing = dataclasses.replace(encoders.encode_tokens, function=compute)
        return dataclasses.replace(encoders, encode_tokens=refusing, encode_images=refusing)

    monkeypatch.setattr("clip_jax.evaluation.encoders.make_encoders", spied)
    good = write_classes(tmp_path / "good", ("cat", "dog"))
    long = write_classes(tmp_path / "long", ("cat", "word " * 40))
    assert evaluate.main(["--weights", weights, "--datasets", f"{good},{long}"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and errors[0].startswith(f"error: {long}: ") and "tokens" in errors[0]
    assert errors[1] == f"error: {good}: computed"


def test_training_checks_the_prompts_of_its_evaluation_before_the_first_step(tmp_path):
    model = CLIP(CLIPConfig(32, tiny.VIT.vision, TextConfig(32, 2, 64, 1, context_length=16)))
    long = write_classes(tmp_path / "long", ("cat", "word " * 40))
    config = RunConfig("tiny", model.config, eval_datasets=(long,))
    with pytest.raises(UserError, match=f"^{long}: .* tokens"):
        Evaluation(config, Training(model, optax.identity(), make_partitioner(MeshConfig())))


def test_the_distribution_is_never_imported():
    import sys

    prompts.templates_of(LISTED["pets"])
    assert "clip_benchmark" not in sys.modules


def test_names_of_one_set_differ():
    assert len(set(names_in_the_collection("pets"))) == 37
    with pytest.raises(UserError, match="the same label"):
        prompts.class_names_of(Entry(classes=2), ["a", "a"], "twins")
    assert np.unique(prompts.imagenet_synsets()).size == 1000
