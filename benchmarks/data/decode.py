"""Decode, crop and shrink files, one core and one process."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from benchmarks.data.synthetic import BICUBIC, FILE_SIZES, FORMATS, Bytes, encoded, photo
from benchmarks.measure import Rates, absent, build, interleave, per_second, ratio, show, significant, table
from pipeline.prepare import images
from pipeline.prepare.framing import Framing

Decode = Callable[[bytes], Bytes]  # the bytes of a file to uint8 [64, 64, 3]


def _by_frame(px: int) -> Decode:
    framing = Framing(px, "crop", (255, 255, 255))
    return lambda content: images.decode_square(content, "benchmark", framing).pixels


def shrunk(image: Image.Image, px: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.convert("RGB").crop((left, top, left + side, top + side))
    return cropped.resize((px, px), BICUBIC)


def _by_pillow(px: int) -> Decode:
    return lambda content: np.asarray(shrunk(Image.open(io.BytesIO(content)), px))


def _by_torchvision(px: int) -> Decode:
    from torchvision.io import decode_image
    from torchvision.transforms import v2

    shrink = v2.Compose([v2.CenterCrop(min(FILE_SIZES[px])), v2.Resize(px, BICUBIC, antialias=True)])

    def decode(content: bytes) -> Bytes:
        pixels = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        small: Bytes = shrink(pixels).permute(1, 2, 0).contiguous().numpy()
        return small

    return decode


def _by_datasets(px: int) -> Decode:
    import datasets

    feature = datasets.Image()
    return lambda content: np.asarray(shrunk(feature.decode_example({"bytes": content, "path": None}), px))


DECODERS = {
    "crescendo images.frame": _by_frame,
    "Pillow": _by_pillow,
    "torchvision decode, v2": _by_torchvision,
    "Hugging Face Image": _by_datasets,
}


def decode_table(count: int, repeats: int, px: int) -> str:
    """Decoding, cropping and shrinking files of each format."""
    share = max(count // len(FORMATS), 1)
    pictures = [photo(i, *FILE_SIZES[px]) for i in range(share)]
    files = {name: [encoded(picture, name) for picture in pictures] for name in FORMATS}
    decoders = build({name: partial(make, px) for name, make in DECODERS.items()})
    runs = {
        (name, form): per_second(partial(_decode_all, decode, contents))
        for form, contents in files.items()
        for name, decode in decoders.items()
    }
    rates = interleave(runs, repeats)
    mixed = {name: _mixed([rates[name, form] for form in FORMATS]) for name in decoders}
    headers = ["images/s", *FORMATS, "mixed", "ratio", "PSNR"]
    lines = []
    for name in DECODERS:
        if name not in decoders:
            lines.append(absent(name, headers))
            continue
        each = [significant(statistics.median(rates[name, form])) for form in FORMATS]
        agreement = min(_psnr(decoders[name], decoders["Pillow"], contents) for contents in files.values())
        compared = [f"{ratio(mixed[name], mixed['Pillow']):.2f}x", _decibels(agreement)]
        lines.append([name, *each, show(mixed[name]), *compared])
    title = (
        "Decode a {}x{} file, crop to a square, shrink to {} px. PSNR: against Pillow, of the worst format."
    )
    return title.format(*FILE_SIZES[px], px) + "\n\n" + table(headers, lines)


def _decode_all(decode: Decode, contents: Sequence[bytes]) -> int:
    for content in contents:
        decode(content)
    return len(contents)


def _mixed(rates: Sequence[Rates]) -> Rates:
    """Rates of equally many files of each format, round by round."""
    return [statistics.harmonic_mean(together) for together in zip(*rates, strict=True)]


def _psnr(decode: Decode, other: Decode, contents: Sequence[bytes]) -> float:
    errors = [np.square(decode(c).astype(float) - other(c)).mean() for c in contents]
    mean = float(np.mean(errors))
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"
