"""The one folder of a model: written by conversion and by training, opened by all, and never silently altered."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from clip_jax import model_folder
from clip_jax.digests import digest, digests
from clip_jax.errors import UserError
from clip_jax.parallel import MeshConfig, make_partitioner
from clip_jax.weights import load_variables
from tests import tiny


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "vit"
    variables = tiny.variables(tiny.VIT)
    model_folder.write(folder, tiny.VIT, variables)
    return folder, variables


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_is_written_is_read(written):
    folder, variables = written
    config, read = model_folder.read(model_folder.find(folder))
    assert config == tiny.VIT == model_folder.read_config(folder)
    assert_equal(read, variables)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(read))


def test_a_folder_is_not_written_over(written):
    with pytest.raises(UserError, match="exists already"):
        model_folder.write(written[0], tiny.VIT, written[1])


def test_one_flipped_bit_in_any_file_is_noticed_or_changes_nothing(written, tmp_path):
    """Orbax's own bookkeeping holds bits that no array depends on; every other one is an error that says where."""
    folder, variables = written
    noticed = {}
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        content = (folder / file).read_bytes()
        positions = np.random.default_rng(0).choice(len(content), min(3, len(content)), replace=False)
        for position in positions.tolist():
            copy = tmp_path / f"{file.name}-{position}"
            shutil.copytree(folder, copy)
            altered = bytearray(content)
            altered[position] ^= 4
            (copy / file).write_bytes(altered)
            try:
                config, read = model_folder.read(copy)
            except UserError as error:
                assert "is damaged" in str(error)
                noticed.setdefault(str(file), []).append(str(error))
            else:
                assert config == tiny.VIT
                assert_equal(read, variables)
            shutil.rmtree(copy)
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    in_arrays = noticed[str(largest.relative_to(folder))]
    assert len(in_arrays) == 3 and all("params/" in message for message in in_arrays)
    assert len(noticed["description/clip_jax.json"]) == 3


@pytest.mark.parametrize("name", ["altered value", "missing key", "no object", "newer version"])
def test_a_description_that_is_not_ours_is_refused(written, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(written[0], copy)
    file = copy / "description" / "clip_jax.json"
    values = json.loads(file.read_text())
    match name:
        case "altered value":
            values["model"]["image_mean"][0] += 1e-3
        case "missing key":
            del values["digests"]
        case "no object":
            values = [values]
        case "newer version":
            values["version"] = 3
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="version 3" if name == "newer version" else r"clip_jax.json is damaged"):
        model_folder.read(copy)


def test_version_1_still_opens(written, tmp_path):
    """What conversion wrote before: the description in the folder itself, with CRC-32 of each array."""
    folder, variables = written
    old = tmp_path / "old"
    shutil.copytree(folder / "variables", old / "variables")
    flat = flatten_dict(variables, sep="/")
    values = {"version": 1, "config": tiny.VIT.to_dict(), "crc32": {k: model_folder._crc32(v) for k, v in flat.items()}}
    (old / "clip_jax.json").write_text(json.dumps(values))
    config, read = load_variables(old)
    assert config == tiny.VIT
    assert_equal(read, variables)
    values["crc32"]["params/visual/proj"] ^= 1
    (old / "clip_jax.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="params/visual/proj is not what was written"):
        load_variables(old)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_digest_does_not_depend_on_how_an_array_is_split(sizes):
    partitioner = make_partitioner(MeshConfig(*sizes))
    generator = np.random.default_rng(0)
    arrays = {
        "matrix": generator.normal(size=(24, 40)),
        "scalar": generator.normal(size=()),
        "table": generator.normal(size=(8, 3, 70_000)),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()} | {
        "count": np.arange(8, dtype=np.int32)
    }
    spread = {
        k: jax.device_put(v, partitioner.batch_sharding if v.ndim else partitioner.replicated)
        for k, v in arrays.items()
    }
    assert digests(spread) == {name: digest(array) for name, array in arrays.items()}


def test_every_bit_and_every_exchange_changes_a_digest():
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    seen = {digest(array)}
    for position in range(array.nbytes):
        for bit in range(8):
            altered = array.copy()
            altered.view(np.uint8).reshape(-1)[position] ^= 1 << bit
            seen.add(digest(altered))
    assert len(seen) == 1 + 8 * array.nbytes
    assert digest(array[::-1]) not in seen and digest(array.T.reshape(array.shape)) not in seen


def test_numbers_that_are_not_finite_are_named(tmp_path):
    variables = tiny.variables(tiny.VIT)
    variables["params"]["visual"]["proj"][0, 0] = np.nan
    model_folder.write(tmp_path / "nan", tiny.VIT, variables)
    with pytest.raises(UserError, match=r"params/visual/proj has numbers that are NaN"):
        model_folder.read(tmp_path / "nan")
