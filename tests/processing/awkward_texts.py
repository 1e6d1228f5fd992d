"""Texts that are hard to tokenize: every stretch of Unicode, emoji, entities, mojibake, controls, long words."""

import html
import random
import sys
import unicodedata
from collections.abc import Iterator

_SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u2028", "\u3000", "\x85", "\x1c", "\x0b"]
_CONTROLS = [chr(i) for i in (*range(32), *range(0x7F, 0xA0), 0x200D, 0x2029, 0x202E, 0x206A, 0xFEFF, 0xFFFC)]
_CONTROLS += ["\x1b[31m", "\x1b[0;1m", "\ud83d", "\ude00", "\ud83d\ude00"]
_EMOJI = ["😀", "👩", "👨", "👧", "❤", "🏴", "🇫", "🇷", "1", "#", "✊", "🐕"]
_EMOJI_JOINTS = ["\u200d", "\ufe0f", "\ufe0e", "🏽", "🏿", "\u20e3", "\U000e0067", "\U000e007f", ""]
_CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "\u2019s", "'S", "'RE", "'", "''", "&#39;s"]
_CONTRACTIONS += ["'\u017f", "'\u017fs"]  # the long s
_SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|EndOfText|>", "<|\u017ftartoftext|>", "<|end"]
_SPECIAL += ["oftext|>", "</w>", "<w>", "&lt;|endoftext|&gt;", "startoftext", "<|", "|>"]
_WORDS = ["a", "photo", "of", "the", "Dog", "isn", "don", "NAÏVE", "Straße", "ΣΊΣΥΦΟΣ", "İstanbul", "\u212a"]
_WORDS += ["ﬁne", "ǅ", "2024"]
_ENTITIES = [*html.entities.html5, *(name.upper() for name in html.entities.html5 if name.islower())]
_MOJIBAKE = ("latin-1", "cp1252", "cp1251", "cp1250", "iso-8859-2", "mac-roman", "cp437")

# A Unicode block begins at a multiple of 16 and most are longer than 128; each of these holds an assigned character.
_BLOCKS = [
    [chr(i) for i in range(start, start + 128)]
    for start in range(0, sys.maxunicode + 1, 128)
    if any(unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs") for i in range(start, start + 128))
]


def _emoji(rng: random.Random) -> str:
    return "".join(rng.choice(_EMOJI) + rng.choice(_EMOJI_JOINTS) for _ in range(rng.randint(1, 6)))


def _entity(rng: random.Random) -> str:
    code = rng.choice((rng.randrange(300), rng.randrange(0x3000), rng.randrange(0x120000)))
    name = rng.choice((rng.choice(_ENTITIES), f"#{code};", f"#x{code:x};", f"#X{code:X}", f"#{code}"))
    return rng.choice(("&", "&", "&amp;", "&amp;amp;", "&AMP;")) + name


def _mojibake(rng: random.Random) -> str:
    text = " ".join(rng.choices(_WORDS, k=3)) + rng.choice("éàñ\u2019“…—😀日š")
    for _ in range(rng.randint(1, 2)):
        text = text.encode("utf-8", "replace").decode(rng.choice(_MOJIBAKE), "replace")
    return text


def _long_word(rng: random.Random) -> str:
    alphabet = rng.choice(("a", "ab", "abcdefghijklmnopqrstuvwxyz", "!?.", "éüσж", "日本語", "0123456789", "😀🐕"))
    return "".join(rng.choices(alphabet, k=int(10 ** rng.uniform(0.5, 3))))


def _sentence(rng: random.Random) -> str:
    return " ".join(word + rng.choice(("", *_CONTRACTIONS)) for word in rng.choices(_WORDS, k=rng.randint(1, 8)))


def _joined(choices: list[str], most: int):
    return lambda rng: "".join(rng.choices(choices, k=rng.randint(1, most)))


_KINDS = [_emoji, _entity, _mojibake, _sentence, _joined(_CONTROLS, 4), _joined(_SPECIAL, 3), _joined(_SPACES, 3)]


def awkward_texts(count: int, seed: int) -> Iterator[str]:
    """Yields texts of one to five awkward parts; they go through all blocks in turn, and 2% have a very long word."""
    rng = random.Random(seed)
    for i in range(count):
        parts = [rng.choice(_KINDS)(rng) for _ in range(rng.randint(0, 4))]
        parts.append("".join(rng.choices(_BLOCKS[i % len(_BLOCKS)], k=rng.randint(1, 12))))
        if rng.random() < 0.02:
            parts.append(_long_word(rng))
        rng.shuffle(parts)
        yield rng.choice(("", " ", rng.choice(_SPACES))).join(parts)
