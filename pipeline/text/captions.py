"""Captions as clean text. Captions are data: nothing in them is ever run, formatted or looked up.

Standard library only; travels inside registered models, whose prompts are cleaned in the same way.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_CAPTION = 1000  # Characters; longer texts are refused where captions are read.
MAX_MARKS = 8  # Combining marks in a row. Real writing needs fewer; heaps of them are for show.
_PLAIN_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_NO_WORD = str.maketrans(dict.fromkeys('_:"(),', " "))
_JOINER = "\u200d"
_PICTOGRAPHS = "\u2190-\u2bff\U0001f000-\U0001faff"
_STRAY_JOINER = re.compile(f"(?<![\ufe0f{_PICTOGRAPHS}]){_JOINER}|{_JOINER}(?![{_PICTOGRAPHS}])")


def _is_visible(char: str) -> bool:
    """Whether `char` may stay: no control, format, private or unassigned character.

    Unassigned ones in the blocks of emoji may, since some are younger than Python's tables.
    """
    category = unicodedata.category(char)
    return category[0] != "C" or (category == "Cn" and "\U0001f000" <= char <= "\U0001faff")


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "M"


def _limit_marks(text: str) -> str:
    """`text` with the first MAX_MARKS of every run of combining marks."""
    kept, run = [], 0
    for char in text:
        run = run + 1 if _is_mark(char) else 0
        if run <= MAX_MARKS:
            kept.append(char)
    return "".join(kept)


@lru_cache(maxsize=1024)  # Names of folders and classes come again and again.
def normalise(text: str) -> str:
    """`text` as one clean line: NFC, plain quotes, single spaces, no control or invisible characters.

    Joiners stay between emoji, so that a family stays one; runs of combining marks are cut. Any str will
    do, lone surrogates included; the result can be written as UTF-8, and is not changed by a second call.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = text.translate(_PLAIN_QUOTES)
    kept = (" " if c.isspace() else c for c in text if c.isspace() or c == _JOINER or _is_visible(c))
    joined = _STRAY_JOINER.sub("", "".join(kept))
    return " ".join(_limit_marks(unicodedata.normalize("NFC", joined)).split())


def plain_english(name: str) -> str:
    """A name such as `:thumbs_up_medium_skin_tone:` as one types it: `thumbs up medium skin tone`."""
    return " ".join(normalise(name).translate(_NO_WORD).lower().split())


# --- What makes a caption doubtful, in any language.


_FLAWS = {
    "replacement character": r"\ufffd",
    "wrongly decoded": r"\u00c3[\u0080-\u00bf]|\u00e2\u20ac|\u00f0\u0178",  # UTF-8 read as Latin-1.
    "markup": r"<[/!]?[A-Za-z][^<>]*>|<!--|<\?|&(?:[a-z]{2,8}|#\d{1,7});"
    r"|\{\{.*?\}\}|\$\{.*?\}|\[\d+(?:;\d+)*m",
    "a web address": r"(?i:https?://|www\.\w|\b[\w-]+\.(?:com|org|net|io|ru|cn|jp|de|info)\b)",
    "an e-mail address": r"[\w.+-]+@[\w-]+\.\w",
    "a file name": r"(?i:\w\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic|heif|jxl)\b)",
    "looks like a secret": r"\bAKIA[0-9A-Z]{16}\b|\bgh[opsur]_\w{36}|\bgithub_pat_\w{22}|\bhf_[A-Za-z]{30}"
    r"|\bsk-[\w-]{20}|\bxox[abprs]-[\w-]{10}|\bAIza[\w-]{35}|\beyJ[\w-]{10,}\.eyJ|-----BEGIN [A-Z ]*KEY",
    "one character repeated": r"([^\d\s])\1{4}",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _FLAWS.items()}
# Words; signs of scripts written without spaces count as one each.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+")
_PHRASE = 6  # Words, the longest phrase checked for repetition.


def _mostly_not_letters(caption: str) -> bool:
    """Fewer than half are letters, their marks or pictographs. A few signs (`7`, `A4`) may be a name."""
    signs = [c for c in caption if not c.isspace() and c != _JOINER]
    letters = sum(unicodedata.category(c) in ("So", "Sk", "Cn") or c.isalpha() or _is_mark(c) for c in signs)
    return len(signs) > 3 and 2 * letters < len(signs)


def _repeats_words(caption: str) -> bool:
    """Whether a phrase of up to six words, and of two characters at least, comes three times in a row."""
    words = _WORDS.findall(caption.casefold())
    for size in range(1, _PHRASE + 1):
        for start in range(len(words) - 3 * size + 1):
            first, second, third = (words[start + i * size : start + (i + 1) * size] for i in range(3))
            if first == second == third and len("".join(first)) > 1:
                return True
    return False


def text_flaws(caption: str) -> list[str]:
    """What makes a normalised caption doubtful, in short words and a fixed order; empty if nothing does.

    Hints for people, not verdicts: no language is assumed and nothing is changed.
    """
    flaws = [name for name, pattern in _PATTERNS.items() if pattern.search(caption)]
    flaws += ["mostly not letters"] * _mostly_not_letters(caption)
    return flaws + ["repeated words"] * _repeats_words(caption)
