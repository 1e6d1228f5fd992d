"""Retrieval: ranks by brute force, recall by CLIP_benchmark's way in PyTorch, the whole way from shards to a row."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from clip_jax.data.access import Access
from clip_jax.data.example import Example
from clip_jax.errors import UserError
from clip_jax.evaluation import ranks
from clip_jax.evaluation.datasets import EvaluationSet, evaluation_set
from clip_jax.evaluation.ranks import own_ranks, retrieval_metrics
from clip_jax.evaluation.retrieval import RetrievalResult, zero_shot_retrieval
from clip_jax.evaluation.tasks import chosen_tasks
from clip_jax.processing import tokenize
from tests import reference_models
from tests.data.make_shards import photo, write_tar

CONFIG = dataclasses.replace(
    reference_models.ODD_VIT, text=dataclasses.replace(reference_models.ODD_VIT.text, vocab_size=49408)
)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def made_up(images, texts, noise, seed=0, width=16):
    """Features of images, and of captions near them, in no order."""
    generator = np.random.default_rng(seed)
    image_of_text = np.concatenate([np.arange(images), generator.integers(0, images, texts - images)])
    generator.shuffle(image_of_text)
    image_features = unit(generator.normal(size=(images, width)))
    text_features = unit(image_features[image_of_text] + noise * generator.normal(size=(texts, width)))
    return image_features.astype(np.float32), text_features.astype(np.float32), image_of_text


def brute_force(queries, candidates, query_groups, candidate_groups):
    """Every cosine by itself, as an exactly rounded sum of float64 products, which are exact."""
    found = []
    for query, group in zip(queries.astype(np.float64), query_groups, strict=True):
        cosines = [math.fsum(query * candidate) for candidate in candidates.astype(np.float64)]
        own = [cosine for cosine, other in zip(cosines, candidate_groups, strict=True) if other == group]
        others = [cosine for cosine, other in zip(cosines, candidate_groups, strict=True) if other != group]
        found.append(sum(cosine >= max(own) for cosine in others))
    return found


def recall_of_clip_benchmark(scores, positive_pairs, k):
    """`batchify(recall_at_k)` of its zeroshot_retrieval: a hit if any positive is in the top k."""
    scores, positive_pairs = torch.from_numpy(scores), torch.from_numpy(positive_pairs)
    top = torch.topk(scores, k, dim=1).indices
    hits = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top, True) & positive_pairs
    return hits.any(dim=1).double().mean().item()


def expected_recall(images, texts, image_of_text):
    scores = texts.astype(np.float64) @ images.astype(np.float64).T
    positive = image_of_text[:, None] == np.arange(len(images))[None]
    both = {"image": (scores, positive), "text": (scores.T.copy(), positive.T.copy())}
    return {
        f"{name}_retrieval_recall@{k}": recall_of_clip_benchmark(*tables, k)
        for name, tables in both.items()
        for k in (1, 5, 10)
    }


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_recall_is_clip_benchmarks(block, monkeypatch):
    monkeypatch.setattr(ranks, "_BLOCK", block)
    images, texts, image_of_text = made_up(40, 130, 0.4)
    got = retrieval_metrics(images, texts, image_of_text)
    expected = expected_recall(images, texts, image_of_text)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected["image_retrieval_recall@1"] < expected["image_retrieval_recall@10"] < 1
    assert set(got) == {*expected, "image_retrieval_median_rank", "text_retrieval_median_rank"}


@pytest.mark.parametrize("block", [1, 100, 2**22])
@pytest.mark.parametrize("data", ["random", "copies", "few values", "collapsed"])
def test_ranks_with_ties(data, block, monkeypatch):
    monkeypatch.setattr(ranks, "_BLOCK", block)
    images, texts, image_of_text = made_up(12, 40, 0.5, seed=1)
    generator = np.random.default_rng(2)
    if data == "copies":
        images[[3, 7, 11]] = images[0]
        texts[generator.permutation(40)[:15]] = texts[5]
    if data == "few values":
        images, texts = (generator.choice(np.float32([-0.25, 0.25]), features.shape) for features in (images, texts))
    if data == "collapsed":
        images[:], texts[:] = images[0], images[0]
    numbers = np.arange(12)
    for arguments in ((texts, images, image_of_text, numbers), (images, texts, numbers, image_of_text)):
        found = own_ranks(*arguments)
        np.testing.assert_array_equal(found, brute_force(*arguments))
        order = generator.permutation(len(arguments[1]))
        queries, candidates, query_groups, candidate_groups = arguments
        again = own_ranks(queries, candidates[order], query_groups, candidate_groups[order])
        np.testing.assert_array_equal(again, found)


def test_what_only_rounding_tells_apart_is_a_tie():
    """Two copies of a vector: products of matrices sum one in another order than the other."""
    images, texts, image_of_text = (np.eye(2), np.ones((1, 2)) / np.sqrt(2), np.zeros(1, int))
    for own_is_nearer_by, rank in ((0, 1), (1e-12, 1), (-1e-12, 1), (1e-7, 0), (-1e-7, 1)):
        moved = images * (1 + np.array([[own_is_nearer_by], [0]]))
        assert own_ranks(texts, moved, image_of_text, np.arange(2)).tolist() == [rank]
    images, texts, image_of_text = made_up(41, 203, 0.5, width=512)  # at such sizes it happens
    for features in (images, texts):
        features[:] = features[np.random.default_rng(0).integers(0, 3, len(features))]
    arguments = (texts, images, image_of_text, np.arange(41))
    np.testing.assert_array_equal(own_ranks(*arguments), brute_force(*arguments))


def test_a_collapsed_model_finds_nothing():
    images, _, image_of_text = made_up(12, 40, 0.5)
    metrics = retrieval_metrics(np.tile(images[:1], (12, 1)), np.tile(images[:1], (40, 1)), image_of_text)
    assert {value for name, value in metrics.items() if "recall" in name} == {0}
    assert metrics["image_retrieval_median_rank"] == 12


def test_the_median_rank_counts_from_one():
    images, texts, image_of_text = made_up(12, 40, 0)
    metrics = retrieval_metrics(images, texts, image_of_text)
    assert metrics["image_retrieval_median_rank"] == metrics["text_retrieval_median_rank"] == 1
    assert metrics["image_retrieval_recall@1"] == metrics["text_retrieval_recall@1"] == 1


def test_more_than_there_is_to_choose_from_is_left_out():
    metrics = retrieval_metrics(*made_up(3, 7, 0.1))
    recalls = [name for name in metrics if "recall" in name]
    assert recalls == ["image_retrieval_recall@1", "text_retrieval_recall@1", "text_retrieval_recall@5"]


def test_an_image_without_a_caption_is_an_error():
    images, texts, image_of_text = made_up(4, 9, 0.1)
    with pytest.raises(UserError, match="at least one caption for each image"):
        retrieval_metrics(images, texts, np.where(image_of_text == 2, 1, image_of_text))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_features_that_are_not_finite_are_an_error(side, value):
    features = made_up(4, 9, 0.1)
    features[side][1, 2] = value
    with pytest.raises(UserError, match=r"1 of .* are NaN or infinite"):
        retrieval_metrics(*features)
    with pytest.raises(UserError, match=rf"photos, features of {('images', 'captions')[side]}: .* 1 of"):
        RetrievalResult(EvaluationSet("photos", Photos()), *features)


CAPTIONS = [tuple(f"photo {index}, seen {word}" for word in ("once", "twice", "again")[: 1 + index % 3])
            for index in range(13)]  # fmt: skip
CAPTIONS[4] = ("word " * 40, "a short one")


class Photos:
    """Photographs with one to three captions."""

    name = "photos"

    def __len__(self):
        return len(CAPTIONS)

    def __getitem__(self, index):
        return Example(photo(index), CAPTIONS[index], key=f"{index:08}")


@pytest.fixture(scope="module")
def wds(tmp_path_factory):
    """The photographs in the layout of the clip-benchmark collection."""
    root = tmp_path_factory.mktemp("hub") / "wds_photos"
    (root / "test").mkdir(parents=True)
    (root / "dataset_type.txt").write_text("retrieval\n")
    (root / "test" / "nshards.txt").write_text("2\n")
    for number, indices in enumerate((range(7), range(7, 13))):
        write_tar(root / "test" / f"{number}.tar", indices, content=_members)
    return root


def _members(index):
    return {"jpg": photo(index), "txt": "\n".join(CAPTIONS[index]).encode() + b"\n"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """OpenAI's model with random weights, and its file."""
    model = reference_models.random_openai_model(CONFIG)
    path = tmp_path_factory.mktemp("weights") / "openai.pt"
    reference_models.save_torchscript(model, CONFIG, path)
    return model, str(path)


def openai_features(model):
    """As in OpenAI's notebook, with PIL in place of torchvision."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    side, pixels = CONFIG.vision.image_resolution, []
    for index in range(len(CAPTIONS)):
        image = Image.open(io.BytesIO(photo(index)))
        width, height = (int(side * length / min(image.size)) for length in image.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        pixels.append((np.asarray(image.convert("RGB")) / 255 - np.array(mean)) / np.array(deviation))
    tokens = tokenize([text for own in CAPTIONS for text in own], CONFIG.text.context_length, truncate=True)
    images = torch.from_numpy(np.stack(pixels).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = model.encode_image(images), model.encode_text(torch.from_numpy(tokens))
    return [unit(one.numpy()) for one in features]


def test_the_whole_way_against_openais_model(wds, reference, tmp_path, capsys):
    model, path = reference
    dataset = evaluation_set(str(wds))
    result = zero_shot_retrieval(*evaluate.load_encoders(path, None), dataset, progress=False)
    images, texts = openai_features(model)
    np.testing.assert_allclose(result.image_features, images, atol=1e-4)
    np.testing.assert_allclose(result.text_features, texts, atol=1e-4)
    np.testing.assert_array_equal(result.image_of_text, [n for n, own in enumerate(CAPTIONS) for _ in own])
    expected = expected_recall(result.image_features, result.text_features, result.image_of_text)
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)

    output, report = tmp_path / "results.json", tmp_path / "report.html"
    evaluate.main(["--weights", path, "--datasets", str(wds), "--output", str(output), "--report", str(report)])
    (row,) = json.loads(output.read_text())
    assert row == {
        "dataset": str(wds), "model": path, "pretrained": path, "task": "zeroshot_retrieval", "language": "en",
        "metrics": result.metrics,
    }  # fmt: skip
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " image_retrieval_recall@5 " in line)
    assert line.split()[-1] == f"{expected['image_retrieval_recall@5']:.4f}"
    page = report.read_text()
    assert "Zero-shot:" not in page and f"<td>{len(CAPTIONS)}</td><td>{len(texts)}</td>" in page
    assert f"<td>{expected['text_retrieval_recall@10']:.1%}</td>" in page


@pytest.mark.parametrize("form", ["wds", "split", "folder", "tar"])
def test_every_form_of_the_same_photographs(form, wds, tmp_path):
    name = {"wds": wds, "split": wds / "test", "folder": f"folder:{tmp_path}", "tar": f"tar:{tmp_path}/*.tar"}[form]
    captions = CAPTIONS
    if form == "folder":
        for index in range(13):
            (tmp_path / f"{index:02}.jpg").write_bytes(photo(index))
            (tmp_path / f"{index:02}.txt").write_text("\n".join(CAPTIONS[index]))
    if form == "tar":  # in which a caption is all of its text
        captions = [own[:1] for own in CAPTIONS]
        content = [{"jpg": photo(index), "txt": own[0].encode()} for index, own in enumerate(captions)]
        write_tar(tmp_path / "0.tar", range(13), content=content.__getitem__)
    dataset = evaluation_set(str(name))
    assert (dataset.name, dataset.class_names, len(dataset.source)) == (str(name), (), 13)
    examples = [dataset.source[index] for index in range(13)]
    assert [example.image for example in examples] == [photo(index) for index in range(13)]
    assert [example.captions for example in examples] == [tuple(map(str.strip, own)) for own in captions]
    assert [task.needs for task in chosen_tasks(dataset)] == ["captions"]


def test_a_missing_shard_is_an_error(wds, tmp_path):
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.tar").write_bytes((wds / "test" / "0.tar").read_bytes())
    (tmp_path / "test" / "nshards.txt").write_text("2")
    with pytest.raises(UserError, match=r"test/1.tar cannot be opened: No such file"):
        evaluation_set(str(tmp_path))


@pytest.mark.parametrize("form", ["wds", "folder", "tar"])
def test_damage_is_an_error_and_not_another_score(form, wds, tmp_path):
    content = (wds / "test" / "1.tar").read_bytes()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    for name in ("a.jpg", "b.jpg", "b.txt"):
        (tmp_path / name).write_bytes(photo(0) if name.endswith("jpg") else b"a photo")
    name = {"wds": str(tmp_path), "folder": f"folder:{tmp_path}", "tar": f"tar:{tmp_path}/test/0.tar"}[form]
    with pytest.raises(UserError, match="is damaged, 1 times; first"):
        evaluation_set(name)


def test_an_example_without_captions_is_named(reference):
    class Uncaptioned(Photos):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), captions=() if index == 9 else CAPTIONS[index])

    with pytest.raises(UserError, match="photos, example 9: expected at least one caption"):
        zero_shot_retrieval(
            *evaluate.load_encoders(reference[1], None), EvaluationSet("photos", Uncaptioned()), progress=False
        )


def test_tasks():
    labelled, captioned = evaluation_set("digits"), EvaluationSet("photos", Photos())
    zero_shot, retrieval = chosen_tasks(labelled, ["zeroshot", "retrieval"])
    assert (chosen_tasks(labelled), chosen_tasks(captioned)) == ([zero_shot], [retrieval])
    with pytest.raises(UserError, match="photos has no named classes, which zeroshot needs"):
        chosen_tasks(captioned, ["retrieval", "zeroshot"])
    with pytest.raises(UserError, match="unknown task 'zero_shot': expected head or zeroshot or retrieval"):
        chosen_tasks(labelled, ["zero_shot"])


def test_a_tfds_set_can_serve_either_task(photos_dir, tmp_path):
    from tests.tiny_photos import TinyConfigs

    TinyConfigs(config="green", data_dir=tmp_path, file_format="array_record").download_and_prepare()
    for name, data_dir, needs in (
        ("tiny_photos/train", photos_dir, "named classes"),
        ("tiny_configs/green/train", str(tmp_path), "captions"),
    ):
        dataset = evaluation_set(name, Access(data_dir))
        assert [task.needs for task in chosen_tasks(dataset)] == [needs]
        assert chosen_tasks(dataset, ["retrieval"])


def test_neither_classes_nor_captions():
    class Bare(Photos):
        def __getitem__(self, index):
            return Example(photo(index), label=1)

    with pytest.raises(UserError, match="bare has neither named classes nor captions"):
        chosen_tasks(EvaluationSet("bare", Bare()))
