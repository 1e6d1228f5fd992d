"""Captions per second of our tokenizers, OpenAI's `simple_tokenizer.py` and the Rust package `tokenizers`.

    python -m benchmarks.tokenizer [--captions 20000] [--rounds 5]

They take turns in one process on the same captions: cold (empty caches) and warm (the same captions again); the
median round counts, in seconds of CPU time, so rates are per core. `tf_bpe` runs in `Dataset.map` on batches.
`tokenizers`, if installed, has the same merges and gets the reference's cleaning. On how many captions each differs
from the reference is printed too.
"""

import argparse
import functools
import html
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import ftfy

from benchmarks.machine import cpu
from clip_jax.processing import bpe

# A contestant is made for the texts that it encodes.
EncodeAll = Callable[[], list[list[int]]]

BATCH = 1024

SUBJECTS = ("a photo of a dog", "two children", "an old man's boat", "the bride & groom", "a café in Paris")
VERBS = ("running across", "sitting on", "painted in", "photographed by night near", "isn't really from")
PLACES = ("the beach", "a wooden table", "New York, NY", "a garden (close-up)", "Zürich", "a mountain lake")


def captions(count: int, rng: random.Random) -> Iterator[str]:
    """Yields captions like web data's: common and rare words, numbers, punctuation, some non-ASCII."""
    pieces = bpe.vocabulary().pieces
    words = [piece[:-4].decode() for piece in pieces if piece.endswith(b"</w>") and piece.isascii()]
    for _ in range(count):
        phrase = [*map(rng.choice, (SUBJECTS, VERBS, PLACES)), *rng.choices(words, k=rng.randrange(6))]
        ending = rng.choice(("", ".", "!", f" - {rng.randrange(1900, 2025)}", f" #{rng.randrange(10**6)}"))
        yield " ".join(phrase) + ending


def ours(texts: tuple[str, ...]) -> EncodeAll:
    """Returns clip_jax's tokenizer with empty caches."""
    bpe.vocabulary()
    bpe._cached_chunk_ids.cache_clear()
    return lambda: [bpe.encode(text) for text in texts]


@functools.cache  # TensorFlow's threads are chosen once; there is no cache of texts to empty
def in_graph(texts: tuple[str, ...]) -> EncodeAll:
    """Returns clip_jax's tokenizer as TensorFlow ops, in a dataset of batches, on one thread."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from clip_jax.processing.tf_bpe import TfTokenizer

    tokenizer = TfTokenizer()
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    dataset = tf.data.Dataset.from_tensor_slices([*texts]).batch(BATCH).with_options(options)
    dataset = dataset.map(lambda batch: tokenizer(batch, truncate=True))

    def encode_all() -> list[list[int]]:
        rows = [row for batch in dataset.as_numpy_iterator() for row in batch.tolist()]
        return [row[1 : row.index(bpe.END_OF_TEXT)] for row in rows]

    return encode_all


@functools.cache
def reference_module():
    """Loads OpenAI's tokenizer by path: importing its package needs torch."""
    path = metadata.distribution("openai-clip").locate_file("clip/simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(texts: tuple[str, ...]) -> EncodeAll:
    """Returns OpenAI's tokenizer with an empty cache."""
    encode = reference_module().SimpleTokenizer().encode
    return lambda: [encode(text) for text in texts]


def rust(texts: tuple[str, ...]) -> EncodeAll:
    """Returns a tokenizer of the package `tokenizers`: the reference's merges, pattern and cleaning."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tables = reference_module().SimpleTokenizer()
    merges = list(tables.bpe_ranks)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(tables.encoder, merges, end_of_word_suffix="</w>"))
    words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    cut, to_bytes = Split(words, "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([cut, to_bytes])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(html.unescape(html.unescape(ftfy.fix_text(text))).lower()).ids

    return lambda: [encode(text) for text in texts]


def main() -> None:
    """Prints one line per tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    texts = tuple(captions(flags.captions, random.Random(0)))
    makers = {"clip_jax": ours, "tf_bpe": in_graph, "openai-clip": reference}
    if importlib.util.find_spec("tokenizers"):
        makers["tokenizers"] = rust
    seconds = {(name, state): [] for name in makers for state in ("cold", "warm")}
    ids = {}
    for _ in range(flags.rounds):
        for name, make in makers.items():
            encode_all = make(texts)
            for state in ("cold", "warm"):
                start = time.process_time()
                ids[name] = encode_all()
                seconds[name, state].append(time.process_time() - start)
    print(cpu())
    for name in makers:
        cold, warm = (len(texts) / statistics.median(seconds[name, state]) for state in ("cold", "warm"))
        different = sum(a != b for a, b in zip(ids[name], ids["openai-clip"], strict=True))
        print(f"{name:12}{cold:9,.0f} captions/s cold{warm:9,.0f} warm {different:6} of {len(texts)} differ")


if __name__ == "__main__":
    main()
