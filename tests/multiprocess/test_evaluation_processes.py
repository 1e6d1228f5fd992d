"""Two processes of four devices find what one process finds, each from its half of the images."""

import json
import tempfile

import jax
import numpy as np
import pytest

from clip_jax.evaluation.classify import classify
from clip_jax.evaluation.zero_shot import zero_shot
from clip_jax.weights import save
from tests.evaluation import pods
from tests.multiprocess.processes import finish, free_address, start

IMAGES = 5  # of a class


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder that two processes wrote, and what they printed."""
    folder = tmp_path_factory.mktemp("together")
    save(folder / "model", pods.CONFIG, pods.variables(), "jax")
    pictures = pods.Pictures()
    for number in range(IMAGES * len(pods.CLASSES)):
        for name in ("good", "damaged"):
            path = folder / name / pods.CLASSES[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures[number].image.save(path)
    (folder / "damaged" / "red" / "9.png").write_bytes(b"no picture")
    coordinator = free_address()
    processes = [
        start("evaluation_worker", coordinator, index, folder, CLIP_JAX_CACHE=str(folder / f"cache {index}"))
        for index in range(2)
    ]
    out = finish(*processes)
    print(out[0][0])
    return folder, out


@pytest.fixture(scope="module")
def said(together):
    return [json.loads((together[0] / f"{index}.json").read_text()) for index in range(2)]


@pytest.fixture(scope="module")
def alone():
    """What one process finds on one device, and what it read."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("CLIP_JAX_CACHE", cache)
        return pods.evaluated(pods.encoders(jax.devices()[:1]))


@pytest.mark.parametrize("devices", [2, 8])
def test_the_number_of_devices_changes_nothing(alone, devices, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    found, _ = pods.evaluated(pods.encoders(jax.devices()[:devices]), pods.TASKS[:3])
    assert_same(found, alone[0])
    predictions = found["zero_shot/scores"].argmax(axis=1)
    assert len(set(predictions)) > 1


def test_two_processes_find_what_one_finds(alone, together):
    for index in range(2):
        found = dict(np.load(together[0] / f"{index}.npz"))
        assert set(found) == set(alone[0])
        assert_same(found, alone[0])


def assert_same(found, expected):
    """Metrics and predictions are the same; so is what devices compute, but for what the compiler makes of it."""
    for name, array in found.items():
        if array.ndim == 2 and name.endswith("scores"):
            np.testing.assert_array_equal(array.argmax(axis=1), expected[name].argmax(axis=1), err_msg=name)
        if name.startswith("zero_shot"):
            np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)
        if array.ndim < 2:
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_each_process_reads_half_of_the_images(said):
    once = list(range(pods.EXAMPLES))
    for task, times in (("zero_shot", 1), ("zero_shot_retrieval", 1), ("linear_probe", 2), ("few_shot", 2)):
        parts = [each["read"][task]["test"] for each in said]
        assert sorted(parts[0] + parts[1]) == sorted(once * times)
        assert abs(len(parts[0]) - len(parts[1])) <= pods.CHUNK * times
        if task != "few_shot":  # which reads chunks to find their features, and its half of the images to classify them
            assert not {*parts[0]} & {*parts[1]}
    parts = [each["read"]["linear_probe"]["train"] for each in said]
    assert sorted(parts[0] + parts[1]) == sorted([*range(pods.TRAIN)] * 2)
    again = [each["read again"] for each in said]
    assert sorted(again[0] + again[1]) == once


def test_each_process_keeps_the_features_of_its_chunks(together):
    kept = [{path.name for path in (together[0] / f"cache {index}").glob("features/*/*.npz")} for index in range(2)]
    chunks = -(-pods.EXAMPLES // pods.CHUNK) + -(-pods.TRAIN // pods.CHUNK)
    assert len(kept[0]) + len(kept[1]) == chunks and not kept[0] & kept[1] and abs(len(kept[0]) - len(kept[1])) <= 2


def test_fewer_images_than_processes(said):
    own = pods.encoders(jax.devices()[:1])
    expected = zero_shot(own, pods.variables(), pods.dataset(1), progress=False).scores.tolist()
    assert said[0]["one"] == said[1]["one"]
    np.testing.assert_allclose(said[0]["one"], expected, atol=1e-5)


def test_images_and_labels(together, said):
    own, images = pods.encoders(jax.devices()[:1]), sorted(map(str, (together[0] / "good").glob("*/*.png")))
    expected = classify(own, pods.variables(), images, pods.CLASSES, progress=False).probabilities.tolist()
    assert said[0]["probabilities"] == said[1]["probabilities"]
    np.testing.assert_allclose(said[0]["probabilities"], expected, atol=1e-5)


def test_what_one_process_cannot_read_ends_both(said):
    assert said[1]["broken"] == "pictures, example 90: it is broken"
    assert said[0]["broken"] == "process 1 refused to go on: pictures, example 90: it is broken"
    for each in said:
        assert "nowhere.png: expected a readable image" in each["missing"]
        assert each["sizes"] == (
            "pictures must be the same on every host, but its number of examples is 10 on process 0, 11 on process 1"
        )


def test_the_first_process_alone_prints_and_writes(together, said):
    folder, ((printed, errors), (nothing, no_errors)) = together
    assert [each["code"] for each in said] == [1, 1]  # one data set of two is damaged
    (row,) = json.loads((folder / "results.json").read_text())
    assert row["dataset"] == str(folder / "good") and str(folder / "good") in printed
    assert (folder / "new" / "report.html").is_file()
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {folder / 'damaged'}: ") and "9.png'" in line and "expected a readable" in line
    assert not [line for line in nothing.splitlines() if not line.startswith("[Gloo]")]
    assert "error" not in no_errors and "image/s" in errors and "image/s" not in no_errors
