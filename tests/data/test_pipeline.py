import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.digits import Digits
from clip_jax.data.example import Example
from clip_jax.data.pipeline import InputConfig, TrainBatches, evaluation_batches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.targets import Texts
from clip_jax.errors import UserError
from clip_jax.processing import Augment, Preprocess, decode, tokenize
from clip_jax.processing.tokenizers import OpenAITokenizer


class Numbered:
    """Example k is a picture whose red is k, wider than high and graded, with two captions that name k."""

    def __init__(self, name, size, broken=None, error=None):
        self.name, self._size, self._broken, self._error = name, size, broken, error

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        assert 0 <= index < self._size
        if index == self._broken:
            raise self._error("cannot read it")
        pixels = np.full((8, 20, 3), index, np.uint8)
        pixels[:, :, 1] = np.arange(20) * 10
        pixels[:, :, 2] = np.arange(8)[:, None] * 10
        captions = tuple(f"{way} {self.name} {index}" for way in ("picture", "photo"))
        return Example(Image.fromarray(pixels), captions, index % 5)


SOURCES = (Numbered("apple", 50), Numbered("pear", 30))
STRICT = InputConfig()
PROCESSING = {"preprocess": Preprocess(8), "target": Texts(OpenAITokenizer(8)), "augment": Augment()}


def make_batches(sources=SOURCES, weights=(3.0, 1.0), *, seed=1, batch_size=16, config=STRICT, **changes):
    processing = {key: changes.pop(key, PROCESSING[key]) for key in PROCESSING}
    reader = TrainReader(Mixture(tuple(sources), weights, seed, batch_size), **processing)
    return TrainBatches(reader, config, **changes)


def take(count, *arguments, **changes):
    with contextlib.closing(make_batches(*arguments, **changes)) as batches:
        return list(itertools.islice(batches, count))


def assert_same(batches, expected):
    for got, wanted in zip(batches, expected, strict=True):
        assert got.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_array_equal(got[key], wanted[key])


def texts_of(batches):
    return [re.sub(r"<\|.*?\|>", "", decode(row.tolist())).strip("! ") for batch in batches for row in batch["text"]]


def test_batches_have_the_promised_shapes():
    (batch,) = take(1)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "image": (np.uint8, (16, 8, 8, 3)),
        "text": (np.int32, (16, 8)),
    }


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(hosts):
    shares = [take(5, process_index=host, process_count=hosts) for host in range(hosts)]
    steps = zip(*shares, strict=True)
    joined = [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in steps]
    assert_same(joined, take(5))


def test_a_resumed_run_continues_exactly():
    whole = take(12)
    assert_same(take(5, start_step=7), whole[7:])
    last_of_four = [{key: value[12:] for key, value in batch.items()} for batch in whole[7:]]
    assert_same(take(5, start_step=7, process_index=3, process_count=4), last_of_four)


def test_seeds_decide_the_batches():
    (first,), (again,), (other,) = take(1), take(1), take(1, seed=2)
    assert_same([first], [again])
    assert (first["text"] != other["text"]).any()


def test_images_and_texts_belong_together_and_come_once_per_epoch():
    batches = take(5, sources=SOURCES[:1], weights=(1.0,), batch_size=10)
    texts = texts_of(batches)
    shades = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    assert [int(re.sub(r"\D", "", text)) for text in texts] == shades.tolist()  # a BPE token is one digit
    assert sorted(shades) == list(range(50))
    assert {text.split()[0] for text in texts} == {"picture", "photo"}


def test_mixture_keeps_its_weights():
    texts = texts_of(take(10))
    assert sum("pear" in text for text in texts) == 40


def test_crops_are_random_squares_of_the_resized_image():
    batches = take(8, sources=SOURCES[:1], weights=(1.0,))
    starts = np.concatenate([batch["image"][:, 0, 0, 1] for batch in batches]) / 10
    assert set(starts) == set(range(13))
    ramp = batches[0]["image"][0, 0, :, 1].astype(int)
    assert (np.diff(ramp) == 10).all()


def test_crops_and_captions_of_a_sample_differ_between_epochs():
    first, second = take(2, sources=SOURCES[:1], weights=(1.0,), batch_size=50)
    of_sample = []
    for batch in (first, second):
        order = np.argsort(batch["image"][:, 0, 0, 0])
        of_sample.append((batch["image"][order, 0, 0, 1], batch["text"][order, 1]))
    for epoch_1, epoch_2 in zip(*of_sample, strict=True):
        assert 0 < (epoch_1 == epoch_2).sum() < 40


def test_long_captions_are_truncated():
    class Long(Numbered):
        def __getitem__(self, index):
            return Example(Image.new("RGB", (8, 8)), ("word " * 100,))

    (batch,) = take(1, sources=(Long("long", 3),), weights=(1.0,))
    np.testing.assert_array_equal(batch["text"][0], tokenize(["word " * 100], 8, truncate=True)[0])


def test_images_and_captions_are_processed_as_the_model_asks():
    class Cased(Numbered):
        def __getitem__(self, index):
            return Example(Image.linear_gradient("L").resize((40, 20)), ("A Dog",))

    bilinear = Preprocess(8, interpolation="bilinear", resize="squash")
    processing = {"preprocess": bilinear, "target": Texts(OpenAITokenizer(8, lowercase=False))}
    (batch,) = take(1, sources=(Cased("cased", 3),), weights=(1.0,), **processing)
    np.testing.assert_array_equal(batch["text"][0], tokenize("A Dog", 8, lowercase=False)[0])
    squashed = Image.linear_gradient("L").resize((40, 20)).resize((8, 8), Image.Resampling.BILINEAR).convert("RGB")
    np.testing.assert_array_equal(batch["image"][0], squashed)


def test_images_are_augmented_as_asked_and_by_position():
    vary = Augment(crop="resized", scale=(0.5, 1.0), flip=True, color_jitter=(0.2, 0.2, 0.2, 0.1))
    whole = take(4, augment=vary)
    assert_same(take(2, start_step=2, augment=vary), whole[2:])
    plain = take(4)
    for batch, other in zip(whole, plain, strict=True):
        assert not np.array_equal(batch["image"], other["image"])


@pytest.mark.parametrize("error", [UserError, OSError])
def test_unreadable_data_is_the_users_mistake_and_named(error):
    with pytest.raises(UserError, match=r"^apple, example 7: cannot read it$"):
        take(4, sources=(Numbered("apple", 50, broken=7, error=error),), weights=(1.0,))


def test_other_errors_keep_their_type_and_name_the_example():
    with pytest.raises(ZeroDivisionError) as caught:
        take(4, sources=(Numbered("apple", 50, broken=7, error=ZeroDivisionError),), weights=(1.0,))
    assert caught.value.__notes__ == ["while reading apple, example 7"]


def test_an_example_without_captions_is_named():
    class Bare(Numbered):
        def __getitem__(self, index):
            return Example(Image.new("RGB", (8, 8)))

    with pytest.raises(UserError, match="bare, example 0: expected at least one caption"):
        take(1, sources=(Bare("bare", 1),), weights=(1.0,))


def test_batch_size_must_divide_by_the_hosts_at_once():
    with pytest.raises(UserError, match="batch_size 16 does not divide by the number of hosts, 3"):
        make_batches(process_count=3)


def test_reading_ahead_is_bounded_and_closing_ends_the_threads():
    read = []

    class Counting(Numbered):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches = make_batches((Counting("apple", 50),), (1.0,), batch_size=4)
    for _ in range(3):
        next(batches)
    batches.close()
    assert len(read) <= (3 + 2) * 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clip_jax-data")]


def test_evaluation_batches_hold_the_examples_that_are_asked_for():
    examples = np.append(np.arange(50)[::-1], [-1] * 10).reshape(5, 12)
    batches = list(evaluation_batches(Numbered("apple", 50), examples, Preprocess(8)))
    assert [batch["image"].shape for batch in batches] == [(12, 8, 8, 3)] * 5
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_array_equal(joined["image"][:50, 0, 0, 0], np.arange(50)[::-1])
    np.testing.assert_array_equal(joined["label"], np.r_[np.arange(50)[::-1] % 5, [-1] * 10])
    assert joined["captions"][0] == Numbered("apple", 50)[49].captions and joined["captions"][59] is None
    centre = Preprocess(8).resize_and_crop(Numbered("apple", 50)[3].image)
    np.testing.assert_array_equal(joined["image"][46], centre)


def test_evaluation_errors_are_named():
    source = Numbered("apple", 50, broken=7, error=OSError)
    with pytest.raises(UserError, match="apple, example 7: cannot read it"):
        list(evaluation_batches(source, np.arange(48).reshape(4, 12), Preprocess(8)))


def test_digits_through_the_whole_pipeline():
    processing = {"preprocess": Preprocess(32), "target": Texts(OpenAITokenizer(16))}
    (batch,) = take(1, sources=(Digits(),), weights=(1.0,), batch_size=64, **processing)
    assert len({image.tobytes() for image in batch["image"]}) == 64
    for text, row in zip(texts_of([batch]), batch["text"], strict=True):
        assert row[0] == 49406 and 49407 in row
        assert re.search(r"\d|zero|one|two|three|four|five|six|seven|eight|nine", text)


def test_worker_processes_and_their_memory_end_with_a_parent_that_is_killed(tmp_path):
    program = """
import multiprocessing, os, signal
from clip_jax.data.digits import Digits
from clip_jax.data.pipeline import InputConfig, TrainBatches
from clip_jax.data.reader import Mixture, TrainReader
from clip_jax.data.targets import Texts
from clip_jax.processing import Augment, Preprocess
from clip_jax.processing.tokenizers import OpenAITokenizer
if __name__ == "__main__":
    reader = TrainReader(Mixture((Digits(),), (1.0,), 0, 8), Preprocess(32), Texts(OpenAITokenizer(8)), Augment())
    batches = TrainBatches(reader, InputConfig(data_processes=2))
    next(batches)
    children = [child.pid for child in multiprocessing.active_children()]
    memory = [memory.name for memory in batches._delivery._all]
    print(*children, *memory, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    children, memory = result.stdout.split()[:2], result.stdout.split()[2:]
    assert len(children) == 2 and len(memory) == 3
    deadline = time.monotonic() + 60
    left = [Path("/proc", child) for child in children] + [Path("/dev/shm", name) for name in memory]
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [path for path in left if path.exists()]
