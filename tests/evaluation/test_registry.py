"""Registered data sets: from a name to a row, in each form, with generated images."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import evaluate
from clip_jax.data import tfds_builder
from clip_jax.data.access import Access
from clip_jax.data.shapes import CLASS_NAMES
from clip_jax.errors import UserError
from clip_jax.evaluation import collection, prompts, registry
from clip_jax.evaluation.datasets import evaluation_set
from clip_jax.evaluation.registry import EVALUATION_SETS, SUITES, known_name, official_name, paper_values
from clip_jax.evaluation.tasks import chosen_tasks
from clip_jax.models import CLIPConfig, TextConfig, VisionTransformerConfig
from clip_jax.weights import save
from tests import tiny
from tests.data.make_shards import photo, write_tar
from tests.evaluation.generated_sets import (
    FORMS,
    LISTED,
    NAMES_OF_DOWNLOADS,
    WRITERS,
    names_in_the_collection,
    write_wds,
)
from tests.hub_stand_in import Hub, use

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = CLIPConfig(16, VisionTransformerConfig(16, 16, 16, 1, 1, 16), TextConfig(16, 1, 16, 1, context_length=48))
COSTLY = [name for name, entry in LISTED.items() if entry.prompts == 80 and name != "imagenet_a"]  # 80,000 prompts


@pytest.fixture(autouse=True)
def nothing_from_the_network(monkeypatch):
    def refuse(builder):
        raise UserError(f"{builder.info.full_name} would be downloaded")

    monkeypatch.setattr(tfds_builder, "prepare", refuse)
    use(monkeypatch, address="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save(path, CONFIG, tiny.variables(CONFIG), "jax")
    return str(path)


def rows_of(names, weights, folder, monkeypatch):
    """One run of evaluate.py."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(folder))
    output = folder / "results.json"
    assert evaluate.main(["--weights", weights, "--datasets", ",".join(names), "--output", str(output)]) == 0
    return {row["dataset"]: row for row in json.loads(output.read_text())}


def check(rows, names):
    assert list(rows) == names
    for name, row in rows.items():
        entry = LISTED[name]
        assert (row["main_metric"], row["classes"], row["templates"]) == (entry.metric, entry.classes, entry.prompts)
        assert 0 <= row["metrics"][entry.metric] <= 1


FAST = [(form, [name for name in names if name not in COSTLY]) for form, names in FORMS.items()]
SLOW = [(form, [name for name in FORMS[form] if name in COSTLY]) for form in ("wds", "tfds")]


@pytest.mark.parametrize(
    "form, names",
    [
        *(pytest.param(form, names, id=form) for form, names in FAST),
        *(pytest.param(form, names, id=f"{form}, 80,000 prompts", marks=pytest.mark.slow) for form, names in SLOW),
    ],
)
def test_from_the_name_to_the_row(form, names, weights, tmp_path, monkeypatch):
    for name in names:
        WRITERS[form](tmp_path, name)
    check(rows_of(names, weights, tmp_path, monkeypatch), names)


def test_every_set_has_a_form_that_a_test_writes():
    assert {name for names in FORMS.values() for name in names} == set(LISTED)
    assert set(LISTED) == {*SUITES["paper27"], *SUITES["imagenet_robustness"]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    use(monkeypatch, address=hub.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_the_collection_on_the_hub(hub, weights, tmp_path, monkeypatch):
    names = FORMS["wds"]
    for name in names:
        folder = write_wds(tmp_path / "upload", name)
        (folder / "train").mkdir()
        (folder / "train" / "0.tar").write_bytes(b"never asked for")
        hub.upload(f"clip-benchmark/{folder.name}", folder)
    (tmp_path / "data").mkdir()
    check(rows_of(names, weights, tmp_path / "data", monkeypatch), names)
    assert not [path for _, path in hub.requests if "/train/" in path]
    hub.requests.clear()
    use(monkeypatch, address="http://127.0.0.1:9")
    for name in names:
        dataset = evaluation_set(name, Access(str(tmp_path / "data"), offline=True))
        assert dataset.class_names == tuple(names_in_the_collection(name))
    assert not hub.requests


@pytest.mark.parametrize("name", ["coco", "flickr30k", "flickr8k"])
def test_captions_of_the_collection(name, hub, weights, tmp_path, monkeypatch):
    folder = tmp_path / "upload" / collection.folder_name(EVALUATION_SETS[name].wds)
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    (folder / "test" / "nshards.txt").write_text("1")
    write_tar(folder / "test" / "0.tar", range(4), content=lambda k: {"jpg": photo(k), "txt": f"one {k}\ntwo".encode()})
    hub.upload(f"clip-benchmark/{folder.name}", folder)
    (tmp_path / "data").mkdir()
    (row,) = rows_of([name], weights, tmp_path / "data", monkeypatch).values()
    assert row["task"] == "zeroshot_retrieval" and "main_metric" not in row
    with pytest.raises(UserError, match="has no named classes"):
        evaluate.main(["--weights", weights, "--datasets", name, "--tasks", "zeroshot"])


def test_where_nothing_can_be_opened_no_weights_are_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert evaluate.main(["--weights", "ViT-B/32", "--datasets", "imagenet_robustness,birdsnap", "--offline"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [*SUITES["imagenet_robustness"], "birdsnap"]


def test_training_splits(hub, tmp_path):
    """For linear probes: beside the test split, or what VTAB does not test on; fetched only when it is wanted."""
    folder = write_wds(tmp_path, "cifar10")
    assert evaluation_set("cifar10", Access(str(tmp_path))).train is None
    shutil.copytree(folder / "test", folder / "train")
    assert len(evaluation_set("cifar10", Access(str(tmp_path))).train()) == 6
    hub.upload("clip-benchmark/wds_vtab-cifar10", folder)
    dataset = evaluation_set("cifar10", Access(str(tmp_path / "none")))
    assert not [path for _, path in hub.requests if "/train/" in path]
    assert len(dataset.train()) == 6
    WRITERS["tfds"](tmp_path, "eurosat")
    dataset = evaluation_set("eurosat", Access(str(tmp_path)))
    assert (len(dataset.train()), dataset.validation, len(dataset.source)) == (24, None, 6)


def test_images_of_several_classes_have_no_linear_probe(tmp_path):
    folder = write_wds(tmp_path, "voc2007")
    shutil.copytree(folder / "test", folder / "train")
    dataset = evaluation_set("voc2007", Access(str(tmp_path)))
    assert dataset.train and chosen_tasks(dataset, ["zeroshot"])
    for task in ("linear_probe", "few_shot"):
        with pytest.raises(UserError, match=f"no training split whose images have one named class each, which {task}"):
            chosen_tasks(dataset, [task])


def test_before_a_set_is_fetched_its_size_is_said(hub, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(collection.logger, "info", lambda message, *values: said.append(message % values))
    folder = write_wds(tmp_path / "upload", "cifar10")
    hub.upload("clip-benchmark/wds_vtab-cifar10", folder)
    hub.repositories["clip-benchmark/wds_vtab-cifar10"]["test/0.tar"] += bytes(2**24)
    evaluation_set("cifar10", Access(str(tmp_path / "data")))
    assert said == ["fetching the test split of clip-benchmark/wds_vtab-cifar10 from the hub: 0.02 GiB"]


def test_offline_and_nowhere(hub, tmp_path):
    for offline, reason in ((True, "--offline fetches nothing"), (False, "the hub has no such data set")):
        with pytest.raises(UserError) as error:
            evaluation_set("gtsrb", Access(str(tmp_path), offline))
        message = str(error.value)
        assert f"{tmp_path}/wds_gtsrb/test/0.tar" in message and f"{tmp_path}/folder_gtsrb/CLASS/IMAGE" in message
        assert reason in message and (not offline or not hub.requests)


def test_a_fetch_that_broke_off_goes_on(hub, tmp_path):
    folder = write_wds(tmp_path / "upload", "cifar10")
    hub.upload("clip-benchmark/wds_vtab-cifar10", folder)
    source = evaluation_set("cifar10", Access(str(tmp_path))).source
    shard = next((tmp_path / "cache").rglob("snapshots/*/test/1.tar"))
    shard.unlink()
    with pytest.raises(UserError, match="not in the cache of the hub and --offline fetches nothing"):
        evaluation_set("cifar10", Access(str(tmp_path), offline=True))
    assert len(evaluation_set("cifar10", Access(str(tmp_path))).source) == len(source) == 6


@pytest.mark.parametrize("name", [name for name, entry in LISTED.items() if entry.obtain])
def test_what_nobody_distributes_says_what_to_put_where(name, tmp_path):
    with pytest.raises(UserError) as error:
        evaluation_set(name, Access(str(tmp_path)))
    message = str(error.value)
    assert "nobody distributes it" in message and f"expected {tmp_path}/folder_{name}/CLASS/IMAGE" in message


# The labels of TFDS, known before any download, and the prompts' names.

IN_TFDS = {name: entry.tfds["name"] for name, entry in LISTED.items() if entry.tfds} | {"ucf101": "ucf101"}
KNOWN_BEFORE = [name for name in IN_TFDS if name not in NAMES_OF_DOWNLOADS]


@pytest.mark.parametrize("name", KNOWN_BEFORE)
def test_names_belong_to_labels_index_by_index(name, tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.builder(IN_TFDS[name], data_dir=str(tmp_path)).info.features
    labels = features["labels"].feature.names if name == "voc2007" else features["label"].names
    names = prompts.class_names_of(LISTED[name], labels, name)
    renamed = {(label, new) for label, new, reason in LISTED[name].renamed if reason}
    synsets = dict(zip(prompts.imagenet_synsets(), prompts.listed_class_names(LISTED["imagenet"]), strict=True))
    differ = {pair for pair in zip(labels, names, strict=True) if letters(pair[0]) != letters(pair[1])}
    if prompts.are_synsets(labels):
        assert {new == synsets[label] for label, new in differ} == {True}
    else:
        assert differ == {pair for pair in renamed if letters(pair[0]) != letters(pair[1])}
        assert all(new != prompts.readable(label) for label, new in renamed)
        assert len(set(names)) == len(names)
    listed = prompts.listed_class_names(LISTED[name])
    assert not listed or set(names) == set(listed)


@pytest.mark.parametrize("name", NAMES_OF_DOWNLOADS)
def test_names_that_come_with_the_download_are_the_prompts(name, tmp_path):
    """Index by index, as the reference repository has them (prompts.md): with spaces for underscores."""
    WRITERS["tfds"](tmp_path, name)
    names = tuple(label.replace("_", " ") for label in NAMES_OF_DOWNLOADS[name])
    assert evaluation_set(name, Access(str(tmp_path))).class_names == names
    assert len(set(names)) == LISTED[name].classes and not LISTED[name].renamed


def letters(name):
    return "".join(filter(str.isalnum, name.removeprefix(f"/{name[1:2]}/").lower()))


def test_the_synsets_are_those_of_tfds_and_the_names_those_of_clip(tmp_path):
    import tensorflow_datasets as tfds

    for name in ("imagenet", "imagenet_a", "imagenet_r"):
        features = tfds.builder(IN_TFDS[name], data_dir=str(tmp_path)).info.features
        assert tuple(features["label"].names) == prompts.imagenet_synsets()
    known = {
        "n01440764": "tench",
        "n02123045": "tabby cat",
        "n03126707": "construction crane",
        "n02012849": "crane bird",
    }
    assert prompts.class_names_of(LISTED["imagenet"], list(known), "three classes") == tuple(known.values())


def test_the_order_of_labels_is_the_data_sets_own():
    entry = LISTED["pets"]
    names = prompts.listed_class_names(entry)
    labels = [name.lower().replace(" ", "_") for name in reversed(names)]
    assert prompts.class_names_of(entry, labels, "pets") == tuple(reversed(names))
    with pytest.raises(UserError, match="1 of its 37 classes otherwise than expected, such as 'wolf'"):
        prompts.class_names_of(entry, ["wolf", *labels[1:]], "pets")
    with pytest.raises(UserError, match="the same label to several"):
        prompts.class_names_of(entry, [labels[1], *labels[1:]], "pets")


# Classes and templates of the paper (prompts.md of the reference repository; the notebook for ImageNet).
PAPER = """food101 101/1, cifar10 10/18, cifar100 100/18, birdsnap 500/1, sun397 397/2, cars 196/8, aircraft 100/2,
voc2007 20/1, dtd 47/8, pets 37/1, caltech101 102/34, flowers 102/1, mnist 10/1, fer2013 7/6, stl10 10/2, eurosat 10/3,
resisc45 45/18, gtsrb 43/3, kitti 4/1, country211 211/5, pcam 2/1, ucf101 101/48, kinetics700 700/28, clevr 8/1,
hateful_memes 2/1, sst2 2/1, imagenet 1000/80"""
DIFFERENT = {"resisc45": (18, 4), "pcam": (1, 2)}  # the lists of clip-benchmark have other templates here


def test_classes_and_templates_are_as_many_as_the_papers():
    paper = [line.split() for line in PAPER.split(",")]
    assert [name for name, _ in paper] == list(SUITES["paper27"])
    for name, counts in paper:
        classes, templates = map(int, counts.split("/"))
        entry = LISTED[name]
        assert entry.classes == classes and len(prompts.templates_of(entry)) == entry.prompts, name
        assert (templates, entry.prompts) == DIFFERENT.get(name, (entry.prompts, entry.prompts)), name
        assert len(set(prompts.templates_of(entry))) == entry.prompts, name
        assert len(prompts.listed_class_names(entry)) in (0, classes), name


VTAB = "a task of VTAB that is not in the paper's suite"
OUTSIDE = {  # lists of clip-benchmark that no set of the paper's suite uses
    **dict.fromkeys(("svhn", "dmlab", "diabetic_retinopathy", "clevr_closest_object_distance"), VTAB),
    **dict.fromkeys(("smallnorb_label_azimuth", "smallnorb_label_elevation"), VTAB),
    **dict.fromkeys(("dsprites_label_x_position", "dsprites_label_orientation"), VTAB),
    "voc2007": "one class for each object that is cut out; the paper's has several for each image",
    "caltech101": "another order, of torchvision's folders",
    "dummy": "a template for tests of clip-benchmark",
}


@pytest.mark.parametrize("file, kind", [(prompts._CLASS_NAMES, "class_names"), (prompts._TEMPLATES, "templates")])
def test_every_list_of_clip_benchmark_is_as_long_as_the_papers(file, kind):
    counts = {name: tuple(map(int, counts.split("/"))) for name, counts in map(str.split, PAPER.split(","))}
    sets = {}
    for name in SUITES["paper27"]:  # by the list that the registry names, or else by the name in the collection
        listed = getattr(LISTED[name], kind)
        sets[listed if isinstance(listed, str) else LISTED[name].wds.rpartition("/")[2]] = name
    unused = set()
    for listed, items in prompts._listed(file).items():
        if listed not in sets or (listed in OUTSIDE and listed != getattr(LISTED[sets[listed]], kind)):
            unused.add(listed)
            continue
        classes, templates = counts[sets[listed]]
        expected = classes if kind == "class_names" else DIFFERENT.get(sets[listed], (0, templates))[1]
        assert len(items) == expected, listed
    assert unused <= set(OUTSIDE), unused - set(OUTSIDE)


def test_what_comes_with_the_project(data_dir, weights, tmp_path, monkeypatch):
    names = ["shapes", "shapes_seen", "digits"]
    monkeypatch.setattr(evaluate, "Access", lambda offline: Access(data_dir, offline))
    rows = rows_of(names, weights, tmp_path, monkeypatch)
    assert {name: (row["main_metric"], row["templates"]) for name, row in rows.items()} == {
        "shapes": ("acc1", 6), "shapes_seen": ("acc1", 6), "digits": ("acc1", 4),
    }  # fmt: skip
    assert [rows[name]["classes"] for name in names] == [len(CLASS_NAMES)] * 2 + [10]


def test_the_papers_metrics():
    """Table 9."""
    expected = dict.fromkeys(SUITES["paper27"], "acc1")
    expected |= dict.fromkeys(("aircraft", "pets", "caltech101", "flowers"), "mean_per_class_recall")
    expected |= {"voc2007": "mean_average_precision", "hateful_memes": "roc_auc", "kinetics700": "mean_acc1_acc5"}
    assert {name: LISTED[name].metric for name in SUITES["paper27"]} == expected


def test_the_papers_values():
    def value(model, name, task="zeroshot_classification"):
        return paper_values(model, name, task).get({"linear_probe": "lp_"}.get(task, "") + LISTED[name].metric)

    assert value("ViT-B/32", "imagenet") == 0.632 and value("RN50", "food101") == 0.811
    assert value("ViT-L/14@336px", "hateful_memes") == 0.633 and value("ViT-L/14@336px", "objectnet") == 0.723
    assert value("ViT-B/32", "imagenet_v2") is None and value("demo", "imagenet") is None
    means = {"RN50": (54.7, 75.8), "RN50x64": (66.1, 83.0), "ViT-B/16": (61.0, 80.9), "ViT-L/14@336px": (67.6, 85.1)}
    for model, expected in means.items():
        for task, mean in zip(("zeroshot_classification", "linear_probe"), expected, strict=True):
            assert abs(100 * np.mean([value(model, name, task) for name in SUITES["paper27"]]) - mean) < 0.06
    assert paper_values("ViT-L/14@336px", "coco", "zeroshot_retrieval")["text_retrieval_recall@1"] == 0.584
    for tables in registry._TABLES["paper"].values():
        assert {len(table) for table in tables.values() if isinstance(table, list)} <= {27, 32}


def test_the_docs_have_what_the_registry_has():
    text = (Path(evaluate.__file__).parent / "docs" / "reproducing.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"
    ]
    listed, zero_shot, probe = rows[: len(LISTED)], rows[len(LISTED) :][:27], rows[len(LISTED) + 27 :][:27]
    for name, classes, templates, where in listed:
        entry = LISTED[name]
        assert (int(classes), int(templates)) == (entry.classes, entry.prompts)
        places = {f"wds_{entry.wds.replace('/', '-')}"} if entry.wds else {f"folder_{name}"} if entry.obtain else set()
        places |= {entry.tfds[key] for key in ("name", "split") if key in entry.tfds}
        assert set(re.findall(r"[^`;, ]+", where)) - {"TFDS"} == places
    models = list(registry._TABLES["paper"]["linear_probe"])
    for own, task in ((zero_shot, "zeroshot_classification"), (probe, "linear_probe")):
        assert [row[0] for row in own] == list(SUITES["paper27"])
        for name, *cells in own:
            for model, cell in zip(models, cells[-len(models) :], strict=True):
                (value,) = paper_values(model, name, task).values()
                assert abs(float(cell) - 100 * value) < 1e-6, (model, name, task)
    retrieved = {name: [float(cell) / 100 for cell in cells] for name, *cells in rows[len(LISTED) + 54 :]}
    for name, (*text_recall, one, five, ten) in retrieved.items():
        found = paper_values("ViT-L/14@336px", name, "zeroshot_retrieval")
        assert list(found.values()) == pytest.approx([one, five, ten, *text_recall])
    assert set(retrieved) == {"flickr30k", "coco"}


def test_names_of_clip_benchmark_are_known():
    assert [known_name(name) for name in ("wds/vtab/pets", "fgvc_aircraft", "vtab/dtd", "pets", "wds/imagenet1k")] == [
        "pets", "aircraft", "dtd", "pets", "imagenet",
    ]  # fmt: skip
    assert known_name("mine") == "mine"
    for model, official in (("ViT-L-14-336", "ViT-L/14@336px"), ("RN50-quickgelu", "RN50"), ("ViT-B-32", "ViT-B/32")):
        assert (official_name(model, "openai"), official_name(model, "laion2b")) == (official, model)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"class": 3}, "set new has no field 'class'; did you mean classes"),
        ({"classes": "3"}, "set new: classes must be of type int, like 8; got '3'"),
        ({"prompts": 1.5}, "set new: prompts must be of type int"),
        ({"classes": True}, "set new: classes must be of type int"),
        ({"classes": -1}, "set new: expected counts from 0, got -1 classes"),
        ({"metric": ""}, "set new: metric must be one of acc1, acc5, .*; got ''"),
        ({"metric": "acc"}, "metric must be one of"),
        ({"templates": 7}, "templates must be of type tuple of str or str"),
        ({"renamed": [["one", "two"]]}, "renamed"),
        ({"source": "digits"}, "source must be of type mapping"),
        (3, "set new must hold the fields source, "),
    ],
)
def test_an_entry_that_is_wrong_is_named(values, message):
    with pytest.raises(UserError, match=message):
        registry.read({"digits": {}, "new": values})
