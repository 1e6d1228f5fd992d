import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clip_jax import cli
from clip_jax.data import show
from clip_jax.data.check import check
from clip_jax.data.sources import make_sources
from clip_jax.data.targets import Texts
from clip_jax.errors import UserError
from clip_jax.processing.tokenizers import OpenAITokenizer
from clip_jax.training.run import make_reader
from tests.data.make_shards import members, write_tar
from train import main as train


@pytest.fixture
def config(tmp_path):
    """A config file over two shards, of which one has an image that cannot be decoded."""
    write_tar(tmp_path / "0.tar", range(6))
    write_tar(tmp_path / "1.tar", range(6, 12), content=lambda i: members(i) | ({"jpg": b"no"} if i == 8 else {}))
    path = tmp_path / "mine.py"
    path.write_text(
        f"""
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({{"name": "mine", "model": "ViT-B/32", "data": {{"tar": {{"path": {str(tmp_path / "*.tar")!r}}}}},
        "batch_size": 8}})
"""
    )
    return str(path)


def test_the_samples_of_a_batch_are_those_of_the_order(config, capsys, tmp_path):
    page = tmp_path / "page.html"
    show.main(["--config", config, "--batch", "2", "--config.on_damage=skip", "--report", str(page)])
    lines = capsys.readouterr().out.splitlines()
    mixture = make_reader(cli.load_config(config)).mixture
    _, indices = mixture.locate(np.arange(16, 24))
    for position, index, line in zip(range(16, 24), indices.tolist(), lines, strict=False):
        at, number = re.match(r"(\d+) \S+ (\d+) ", line).groups()
        assert int(at) == position and (int(number) == index or index == 8)
        assert line.endswith(f"{int(number):08}: photo number {number}: naïve café")
    html = page.read_text()
    assert html.count("data:image/") == 8 and "Batch 2 of mine" in html


def test_a_damaged_sample_stops_or_is_said_to_be_replaced(config, capsys):
    with pytest.raises(UserError, match=r"1.tar, offset \d+: key '00000008'"):
        for batch in ("0", "1"):
            show.main(["--config", config, "--batch", batch])
    for batch in ("0", "1"):
        show.main(["--config", config, "--batch", batch, "--config.on_damage=skip"])
    assert "replaced, because they are damaged: 1 image" in capsys.readouterr().out


def test_the_command_says_one_line_of_a_mistake(config):
    command = [sys.executable, "-m", "clip_jax.data.show", "--config", config, "--batch", "-1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: --batch must be at least 0, got -1\n")


def test_check_reads_everything_and_names_what_is_damaged(config, capsys):
    with pytest.raises(UserError, match=r"1 damaged; mend the data, or train with --config\.on_damage=skip"):
        train(["--config", config, "--check_data"])
    heading, example = capsys.readouterr().out.splitlines()
    assert heading.endswith("*.tar: 12 samples; damaged: 1 image")
    assert re.search(r"image: .*1.tar, offset \d+: key '00000008': image bytes: expected a readable image", example)
    train(["--config", config, "--check_data", "--config.on_damage=skip"])


def test_sound_data_passes(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("black")
    (result,) = check(make_sources({"folder": {"path": str(tmp_path)}})[0], Texts(OpenAITokenizer()))
    assert result.lines() == [f"{tmp_path}: 1 samples, all sound"]


def test_what_is_shown_is_what_is_trained_on(config):
    reader = replace(make_reader(cli.load_config(config)), skip=True)
    images, texts = np.empty((8, 224, 224, 3), np.uint8), np.empty((8, 77), np.int32)
    reader.read(np.arange(8), images, texts)
    for row, sample in enumerate(reader.samples(np.arange(8), Counter())):
        np.testing.assert_array_equal(sample.image, images[row])
        np.testing.assert_array_equal(sample.target, texts[row])
