"""Which texts are plain: all that cleaning does to them is to replace single characters, each by one other.

`bpe` cleans a text with `ftfy.fix_text` and twice with `html.unescape`, then lower-cases it. That works on one
character at a time unless the text

- has a character that is removed or becomes several (control characters, ligatures, "İ");
- looks like mojibake (`ftfy.badness`), the only thing that makes ftfy try other encodings;
- has a character reference ("&amp;");
- may change under Unicode's NFC beyond single characters: one of them may combine with the one before it
  (NFC_Quick_Check=Maybe, https://unicode.org/reports/tr15/#Detecting_Normalization_Forms), or marks are out of order;
- has a "Σ" that may end a word: its lower case depends on the characters around it.

Texts whose only such trouble is one level of usual references are plain as well: `references` has what replaces them.

Tables and patterns are made from the Python that runs, its `ftfy` and `regex`, so no other library's edition of
Unicode matters. The patterns are in the syntax of RE2 (https://github.com/google/re2/wiki/Syntax).
"""

import html.entities
import re
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise

import ftfy
import ftfy.badness
import numpy as np
import regex
from ftfy import fixes
from jaxtyping import Int32

from clip_jax.processing import bpe

REFERENCE = fixes.HTML_ENTITY_RE.pattern
# One "<" in a text keeps ftfy from replacing references; NUL would end a text.
WITH_REFERENCES = rf"[^<\0]*{REFERENCE}[^<\0]*"

_SEPARATOR = "\ue000"  # for private use: nothing changes it or combines with it
# All planes of Unicode that have characters, but for those of private use and the surrogates.
_POINTS = [*range(0xD800), *range(0xE001, 0x40000), *range(0xE0000, 0xE0200)]


def cleaned_characters() -> dict[str, str]:
    """What ftfy makes of each plain character: one that ftfy leaves as it is and that combines with none before it."""
    characters = [*map(chr, _POINTS)]
    fixed = ftfy.fix_text(_SEPARATOR.join(characters), fix_encoding=False, unescape_html=False).split(_SEPARATOR)
    changes = dict(zip(characters, fixed, strict=True))
    inert = {character for character in characters if changes[character] == character} - _combining_with_the_left()
    return {character: fixed for character, fixed in changes.items() if fixed in inert and len(fixed.lower()) == 1}


def cleaning_table(cleaned: Mapping[str, str]) -> Int32[np.ndarray, "code_points"]:
    """`cleaned` from code point to code point; beyond the table's end nothing changes."""
    return _table(cleaned)


def final_table(cleaned: Mapping[str, str], lowercase: bool) -> Int32[np.ndarray, "code_points"]:
    """The same, and lower-cased if wished, and " " for all that lies between the words of `bpe`."""
    spaces = {*regex.findall(r"\s", "".join(map(chr, _POINTS)))}
    lowered = {character: fixed.lower() if lowercase else fixed for character, fixed in cleaned.items()}
    final = {character: " " if fixed in spaces else fixed for character, fixed in lowered.items()}
    return _table(final)


def references() -> dict[str, str]:
    """What ftfy replaces before all else: all names, and the usual numbers in the usual spellings."""
    names = {f"&{name}" for name in html.entities.html5 if name.endswith(";")}
    points = [*range(0x20, 0x7F), *range(0xA0, 0x180), *range(0x2010, 0x2123)]
    numbers = {f"&#{number};" for i in points for number in (f"{i}", f"{i:03}", f"x{i:x}", f"x{i:X}")}
    return {reference: fixes.unescape_html(reference) for reference in sorted(names | numbers)}


def only_characters(cleaned: Mapping[str, str]) -> str:
    """Matches the whole of a text of plain characters; no bytes that are not UTF-8."""
    return f"{_set(cleaned)}*"


def mojibake() -> str:
    """Matches somewhere in every text that ftfy takes for mojibake; in few others, since ftfy goes line by line."""
    # RE2 has no verbose mode: what is not in a set of characters loses its spaces and comments.
    pattern = re.sub(r"(\[[^\]]*\])|\s+|#[^\n]*", r"\1", ftfy.badness.BADNESS_RE.pattern)
    for kind in (r"\w", r"\s"):
        pattern = pattern.replace(kind, _set_of(re.compile(kind)))
    return f"(?m:{pattern})"


def depends_on_neighbours(cleaned: Mapping[str, str], lowercase: bool) -> str:
    """Matches somewhere in what `cleaned` made of a text if the reference would change more than single characters."""
    names = "|".join(name for name in html.entities.html5 if not name.endswith(";"))
    # Of a number html.unescape needs no more than one digit, of some names no semicolon.
    reference = rf"&(?:#[0-9]|#[xX][0-9a-fA-F]|[0-9A-Za-z]+;|{names})"
    alternatives = [mojibake(), reference, _marks_out_of_order(cleaned)]
    if lowercase:
        alternatives.append(r"\x{3A3}(?:[^\x{391}-\x{3CE}]|$)")  # before a Greek letter it ends no word
    return "|".join(alternatives)


def word() -> str:
    """Matches a word of `bpe`."""
    fixed, letters, rest = bpe._WORD.pattern.partition(r"|\p{L}+")
    assert (letters, rest) == (r"|\p{L}+", r"|\p{N}|[^\s\p{L}\p{N}]+")
    kinds = (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]")
    letter, number, other = (_set_of(regex.compile(kind, bpe._WORD.flags)) for kind in kinds)
    return f"(?i:{fixed})|{letter}+|{number}|{other}+"


def _combining_with_the_left() -> set[str]:
    """Each second half of a character that decomposes into two, and Hangul's vowels and final consonants."""
    halves = (unicodedata.decomposition(chr(point)).split() for point in _POINTS)
    seconds = {chr(int(half[1], 16)) for half in halves if len(half) == 2 and not half[0].startswith("<")}
    return seconds | {*map(chr, range(0x1161, 0x1176)), *map(chr, range(0x11A8, 0x11C3))}


def _marks_out_of_order(cleaned: Mapping[str, str]) -> str:
    """Matches two marks that NFC would swap: the second has the lower combining class."""
    by_class: dict[int, list[str]] = {}
    for character in cleaned.values():
        by_class.setdefault(unicodedata.combining(character), []).append(character)
    marks = [by_class[number] for number in sorted(by_class) if number]
    return "|".join(_set(second) + _set(first) for first, second in zip(accumulate(marks), marks[1:], strict=False))


def _table(translation: Mapping[str, str]) -> Int32[np.ndarray, "code_points"]:
    changes = {character: other for character, other in translation.items() if other != character}
    table = np.arange(max(map(ord, changes)) + 1, dtype=np.int32)
    table[[*map(ord, changes)]] = [*map(ord, changes.values())]
    return table


def _set_of(kind: "re.Pattern | regex.Pattern") -> str:
    return _set(kind.findall("".join(map(chr, _POINTS))))


def _set(characters: Iterable[str]) -> str:
    """A set of characters in RE2's syntax."""
    points = sorted({*map(ord, characters)})
    gaps = [(a, b) for a, b in pairwise(points) if b != a + 1]
    starts, ends = [points[0], *(b for _, b in gaps)], [*(a for a, _ in gaps), points[-1]]
    return "[" + "".join(rf"\x{{{start:X}}}-\x{{{end:X}}}" for start, end in zip(starts, ends, strict=True)) + "]"
