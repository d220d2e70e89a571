"""Which sides of images the networks of a pyramid take, other than those of squares of its resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REGION, MIXED = 4, 4  # px of a region of one noise level; positions of which adaptive kernels need a multiple
MIXED_FROM = 32  # px of the feature maps of a core that have adaptive kernels


def side_unit(resolution: int, core: Mapping[str, Any], shells: Sequence[Mapping[str, Any]]) -> int:
    """px, at the finest level, of which both sides of an image must be a multiple: a power of two.

    resolution: of the core. core, shells: keyword values of the networks, coarse first."""
    folds = core.get("patch", 1)
    unit = max(
        2, folds * 2 ** (len(core.get("channel_mult", (1, 2, 2))) - 1), REGION if core.get("regions") else 1
    )
    if core.get("kernels", "off") != "off":
        unit = max(unit, MIXED * folds * max(resolution // MIXED_FROM, 1))
    for octave, shell in enumerate(shells, start=1):
        needed = 2 * shell.get("patch", 2) * (1 if shell.get("kernels", "off") == "off" else MIXED)
        unit = max(unit, needed >> octave)
    return unit << len(shells)
