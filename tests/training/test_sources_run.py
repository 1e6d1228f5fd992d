"""Runs on the data that people have: a data set as TFDS prepares it by default, and damaged shards."""

import numpy as np
import pytest

from clip_jax.data.access import Access
from clip_jax.data.pipeline import InputConfig
from clip_jax.judged_run import Evaluation
from clip_jax.training.run import run
from clip_jax.workdir import read_metrics
from tests.data.make_shards import members, write_tar
from tests.training.test_run import config_of, leaves

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def default_photos(tmp_path_factory):
    from tests.tiny_photos import TinyPhotos  # imports TFDS

    directory = str(tmp_path_factory.mktemp("default"))
    builder = TinyPhotos(data_dir=directory)
    builder.download_and_prepare()
    assert builder.info.file_format.value == "tfrecord"
    return directory


def test_a_data_set_in_tfds_own_format_trains_is_evaluated_and_resumes(default_photos, tmp_path):
    class Killed(Exception):
        pass

    def kill(config, training):
        def evaluate(state):
            raise Killed

        return evaluate

    data = {"tfds": {"name": "tiny_photos"}}
    changes = {"data": data, "access": Access(default_photos), "total_steps": 4, "eval_datasets": ("tiny_photos/test",)}
    whole = run(config_of(**changes), str(tmp_path / "whole"), Evaluation)
    evaluated = [line for line in read_metrics(tmp_path / "whole") if "eval/tiny_photos/test/acc1" in line]
    assert evaluated[-1]["step"] == 4
    with pytest.raises(Killed):
        run(config_of(**changes, eval_every=3), str(tmp_path / "killed"), kill)
    resumed = run(config_of(**changes), str(tmp_path / "killed"))
    for got, want in zip(leaves(resumed), leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_run_that_skips_damage_counts_it_and_waits_are_measured(tmp_path):
    write_tar(tmp_path / "0.tar", range(20), content=lambda i: members(i) | ({"jpg": b"no"} if i == 3 else {}))
    write_tar(tmp_path / "1.tar", range(20, 40))
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    config = config_of(
        data={"tar": {"path": str(tmp_path / "*.tar")}},
        input=InputConfig(on_damage="skip", max_damaged=0.5),
        total_steps=4,
    )
    run(config, str(tmp_path / "run"))
    last = read_metrics(tmp_path / "run")[-1]
    assert last["damaged/cut"] == 1  # the shard, when it was opened
    assert last["damaged/image"] >= 1  # a sample, each time that it was drawn
    assert 0 <= last["data_wait_fraction"] <= 1
