"""Damage to checkpoints: all of it is found and named, and the run goes back to the checkpoint before."""

import shutil
import threading
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from clip_jax.digests import start_digests
from clip_jax.errors import DamagedFile, RunStopped
from clip_jax.training import checkpoint
from clip_jax.training import checkpoints as checkpoints_module
from clip_jax.training.checkpoints import Checkpoints
from clip_jax.training.config import make_training
from clip_jax.training.manifest import NOTES, check_manifest
from clip_jax.training.run import run
from clip_jax.training.state import abstract_state, initial_state
from clip_jax.training.step_folder import verify
from tests.training.test_run import CONFIG, config_of, leaves

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2, and the states that they are of."""
    root = epath.Path(tmp_path_factory.mktemp("run"))
    training = make_training(CONFIG)
    state = initial_state(training, seed=0)
    states = {}
    with closing(Checkpoints(root, CONFIG)) as checkpoints:
        for step in (1, 2):
            state = jax.tree.map(lambda leaf: leaf + 1, state)
            checkpoints.save(step, state)
            states[step] = leaves(state)
    return root, states


@pytest.fixture(scope="module")
def like():
    return abstract_state(make_training(CONFIG))


def restored(root, like):
    with closing(Checkpoints(root, CONFIG)) as checkpoints:
        return checkpoints.restore(like)


def assert_is(state, expected):
    for got, want in zip(leaves(state), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << (len(content) % 8)
    path.write_bytes(content)


def test_a_run_does_not_wait_for_digests(tmp_path, monkeypatch):
    """The next step takes the state's memory over before anybody asks for the digests; they are of the old state."""
    waited, go_on = [], threading.Event()

    def late(tree):
        digests = start_digests(tree)
        return lambda: waited.append(go_on.wait(60)) or digests()

    monkeypatch.setattr(checkpoints_module, "start_digests", late)
    state = initial_state(make_training(CONFIG), seed=0)
    with closing(Checkpoints(tmp_path, CONFIG)) as checkpoints:
        checkpoints.save(1, state)
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(state)
        go_on.set()
    assert waited == [True, True]
    verify(epath.Path(tmp_path) / "checkpoints" / "1")


FAULTS = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


def test_every_fault_in_every_file_is_found_and_the_file_named(workdir, tmp_path):
    shutil.copytree(workdir[0], tmp_path, dirs_exist_ok=True)
    folder = epath.Path(tmp_path) / "checkpoints" / "2"
    check_manifest(folder)
    listed = [path for path in files(folder) if path.parent != folder or path.name not in NOTES]
    assert len(listed) > 20
    for path in listed:
        whole = path.read_bytes()
        for name, fault in FAULTS.items():
            if not whole and name in ("flipped", "cut", "emptied"):
                continue
            fault(path)
            with pytest.raises(DamagedFile, match=path.name):
                check_manifest(folder)
            path.write_bytes(whole)
    for other in listed[1:]:
        if listed[0].read_bytes() != other.read_bytes():
            break
    swap(listed[0], other)
    with pytest.raises(DamagedFile, match=listed[0].name):
        check_manifest(folder)


def swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("path", ["opt_state/d", "variables/d", "run/run.json", "files.json", "opt_state/_METADATA"])
@pytest.mark.parametrize("fault", ["flipped", "deleted"])
def test_the_run_goes_back_to_the_checkpoint_before(workdir, like, tmp_path, path, fault, caplog):
    root, states = workdir
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "checkpoints" / "2" / path
    damaged = max(files(damaged), key=lambda file: file.stat().st_size) if damaged.is_dir() else damaged
    FAULTS[fault](damaged)
    state = restored(tmp_path, like)
    assert_is(state, states[1])
    assert int(state.step) == 1
    assert damaged.name in caplog.text and "going back to the checkpoint before" in caplog.text
    assert (tmp_path / "damaged" / "2").is_dir() and not (tmp_path / "checkpoints" / "2").exists()


def test_orbaxs_notes_do_not_matter_or_are_noticed(workdir, like, tmp_path):
    """What a flipped bit in them does: nothing, or the checkpoint before is used; never other numbers."""
    root, states = workdir
    for position in range(0, (root / "checkpoints" / "2" / NOTES[0]).stat().length, 97):
        copied = tmp_path / str(position)
        shutil.copytree(root, copied)
        notes = copied / "checkpoints" / "2" / NOTES[0]
        content = bytearray(notes.read_bytes())
        content[position] ^= 1 << (position % 8)
        notes.write_bytes(content)
        state = restored(copied, like)
        assert_is(state, states[int(state.step)])


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken(workdir, like, tmp_path):
    root, states = workdir
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "7")
    assert_is(restored(tmp_path, like), states[1])


def test_where_all_are_damaged_the_run_does_not_begin_afresh(workdir, tmp_path):
    shutil.copytree(workdir[0], tmp_path, dirs_exist_ok=True)
    for step in "12":
        (tmp_path / "checkpoints" / step / "files.json").unlink()
    with pytest.raises(RunStopped, match=r"every checkpoint of .* is damaged"):
        run(CONFIG, str(tmp_path))
    with pytest.raises(RunStopped, match=r"every checkpoint of .* is damaged"):
        run(CONFIG, str(tmp_path))


def test_what_only_another_process_finds_damaged_is_not_set_aside(workdir, like, tmp_path, monkeypatch):
    """Another host may not see the disk."""
    shutil.copytree(workdir[0], tmp_path, dirs_exist_ok=True)

    def refused(self, step):
        raise DamagedFile("process 1 refused to go on: a file is missing")

    monkeypatch.setattr(Checkpoints, "_check_files", refused)
    with pytest.raises(RunStopped, match="is the workdir shared by all hosts"):
        restored(tmp_path, like)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_arrays_are_checked_even_where_the_files_are_as_they_were_written(workdir, like, tmp_path, monkeypatch):
    """Damage on the way from the devices to the disk."""
    with monkeypatch.context() as patched:
        patched.setattr(
            checkpoints_module, "start_digests", lambda tree: lambda: dict.fromkeys(start_digests(tree)(), "00000000")
        )
        training = make_training(CONFIG)
        with closing(Checkpoints(tmp_path, CONFIG)) as checkpoints:
            checkpoints.save(1, initial_state(training, seed=0))
    with pytest.raises(RunStopped, match="every checkpoint"):
        restored(tmp_path, like)


def test_verify_names_what_is_damaged_and_leaves_it(workdir, tmp_path, capsys):
    shutil.copytree(workdir[0], tmp_path, dirs_exist_ok=True)
    assert checkpoint.main(["verify", str(tmp_path)]) == 0
    data = max(files(tmp_path / "checkpoints" / "1" / "opt_state" / "d"), key=lambda file: file.stat().st_size)
    flip(data)
    assert checkpoint.main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "step 2: whole" in out and f"{data.name} is damaged" in out
    (tmp_path / "checkpoints" / "1" / "files.json").write_bytes(b"")
    assert checkpoint.main(["verify", str(tmp_path)]) == 1
    assert "files.json is damaged" in capsys.readouterr().out
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_checkpoints_are_kept_every_so_many_steps(tmp_path):
    config = config_of(keep_checkpoints=1, keep_every=2)
    state = initial_state(make_training(config), seed=0)
    with closing(Checkpoints(tmp_path, config)) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, state)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
