"""Damage for valid files: bits, blocks, splices and tokens. The same mutant for the same seed and number."""

from collections.abc import Callable, Sequence

import numpy as np

TOKENS = (
    b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\1\0\0",
    b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"eXIf", b"zTXt",
    b"\xff\xd8", b"\xff\xd9", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd\0\4\0\1",
    b"\xff\xe1", b"\xff\xe2", b"Exif\0\0", b"MPF\0", b"Adobe\0", b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X",
    b"ANMF", b"ALPH", b"GIF87a", b"GIF89a", b"!\xf9\4", b"!\xff\x0b", b",", b";", b"BM", b"II*\0", b"MM\0*",
    b"heic", b"mif1", b"hvcC", b"irot", b"grid", b"jxlc", b"jxlp", b"\xff\x0a",
    b"ftyp", b"ispe", b"iloc", b"mdat", b"meta", b"%!PS", b"<svg",
)  # fmt: skip


def mutant(corpus: Sequence[bytes], seed: int, number: int) -> bytes:
    """One of the files, damaged one to four times."""
    draw = np.random.default_rng([seed, number])
    content = corpus[draw.integers(len(corpus))]
    for _ in range(draw.integers(1, 5)):
        damage = DAMAGES[draw.integers(len(DAMAGES))]
        content = damage(content, corpus, draw)
    return content


def _block(content: bytes, draw: np.random.Generator) -> slice:
    """A stretch of the file: mostly a few bytes, seldom most of it."""
    start = int(draw.integers(len(content) + 1))
    return slice(start, start + int(len(content) ** draw.random()))


def flip(content: bytes, corpus: Sequence[bytes], draw: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(content), int(draw.integers(1, 9)))):
        changed[draw.integers(len(changed))] ^= 1 << draw.integers(8)
    return bytes(changed)


def delete(content: bytes, corpus: Sequence[bytes], draw: np.random.Generator) -> bytes:
    block = _block(content, draw)
    return content[: block.start] + content[block.stop :]


def duplicate(content: bytes, corpus: Sequence[bytes], draw: np.random.Generator) -> bytes:
    block = _block(content, draw)
    return content[: block.stop] + content[block] * int(draw.integers(1, 5)) + content[block.stop :]


def splice(content: bytes, corpus: Sequence[bytes], draw: np.random.Generator) -> bytes:
    other = corpus[draw.integers(len(corpus))]
    block = _block(content, draw)
    return content[: block.start] + other[_block(other, draw)] + content[block.stop :]


def token(content: bytes, corpus: Sequence[bytes], draw: np.random.Generator) -> bytes:
    """Put a word that means something over the bytes, or between them."""
    word = TOKENS[draw.integers(len(TOKENS))]
    start = int(draw.integers(len(content) + 1))
    return content[:start] + word + content[start + len(word) * int(draw.integers(2)) :]


DAMAGES: tuple[Callable[[bytes, Sequence[bytes], np.random.Generator], bytes], ...] = (
    flip, delete, duplicate, splice, token,
)  # fmt: skip
