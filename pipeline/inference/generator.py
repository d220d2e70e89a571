"""A snapshot together with its text encoder: prompts in, images out.

Both `crescendo generate` and the registered model (pipeline/registry/served.py) use it, so that a seed gives
the same image in both. It is packed into registered models, and therefore needs neither mlflow nor params.yaml.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.renamed import RENAMED_GUIDES
from pipeline.errors import ConfigError
from pipeline.inference.png import read_made

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.inference.upscaling import UpscaleSettings
    from pipeline.models.conditioning import Conditioning
    from pipeline.models.shape import Shape
    from pipeline.models.snapshot import Snapshot
    from pipeline.text.encoder import TextEncoder


MIN_STRENGTH, MAX_STRENGTH = 0.005, 0.5  # noise added to an image to upscale, as in training
MAX_SEED = 2**63 - 1
MAX_STRETCH = 4  # times the resolution of a model, of the sides of its images
# Images that pass through the network together. The number is fixed, since kernels round by the shape of their
# batch. On a CPU an image in a batch of four costs no more than in one of sixteen; a single one costs 1.7 times
# what it could (docs/log.md).
BATCH = {"cpu": 4, "cuda": 64}


@dataclass(frozen=True)
class Generator:
    """A loaded model and the text encoder that it was trained with.

    default_passes: of a refined model, where no number is asked for; None is its fewest.
    address: of the model, models:/NAME/3 or a folder, which its images are to name; "" where it is not known.
    """

    snapshot: Snapshot
    encoder: TextEncoder
    default_passes: int | None = None
    address: str = ""

    def passes(self, num_steps: int | None = None) -> int | None:
        """Passes per image where `num_steps` are asked for; None for models that are not refined."""
        config = self.snapshot.config
        return (num_steps or self.default_passes or min(config.passes)) if config.is_refined else None

    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        guide: str | None = None,
        resolution: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """One image per prompt and seed, uint8 [N,3,R,R], or of `size`, (width, height). Each depends on its own
        prompt and seed alone, bit for bit on one machine, since batches are filled up to one size (BATCH).

        num_steps: passes of a refined model (None: `default_passes`), else steps of the sampler.
        guidance, sampler, guide: without effect on a refined model.
        resolution: px of any level of the model.
        None is the model's own setting. Raises ConfigError for values that the model does not have.
        """
        import torch

        from pipeline.adversarial.few_step import generate_images
        from pipeline.diffusion.guidance import GUIDES
        from pipeline.diffusion.samplers import ADAPTIVE, SAMPLERS
        from pipeline.models.shape import SQUARE
        from pipeline.models.snapshot import at_resolution

        assert len(prompts) == len(seeds) and prompts
        snapshot = self.snapshot if resolution is None else at_resolution(self.snapshot, resolution)
        steps = check_steps(snapshot, self.default_passes if num_steps is None else num_steps)
        shape = SQUARE if size is None else shape_of(snapshot, size)
        check_name("sampler", sampler, (*SAMPLERS, ADAPTIVE))
        check_name("guide", guide, GUIDES)
        for seed in seeds:
            check_seed(seed)
        batch = BATCH[next(snapshot.denoiser.parameters()).device.type]
        # The last row fills up the batch.
        rows = [*range(len(prompts)), *[len(prompts) - 1] * (-len(prompts) % batch)]
        unique = list(dict.fromkeys(prompts))
        text = self.text(unique).select(torch.tensor([unique.index(prompts[row]) for row in rows]))
        options: dict[str, Any] = {
            "num_steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "guide": guide,
        }
        chosen = {name: value for name, value in options.items() if value is not None}
        settings = dataclasses.replace(snapshot.config.sampling, **chosen)
        own = [seeds[row] for row in rows]
        generated = generate_images(snapshot, text, own, settings, steps, batch, shape)
        return generated.images[: len(prompts)]

    def made(self, **options: Any) -> dict[str, Any]:
        """What images with these options of `images` say of how they were made (png.py), but prompt and seed."""
        config = self.snapshot.config
        sampling, side = config.sampling, options.get("resolution") or config.resolution
        width, height = options.get("size") or (side, side)
        facts = {**self._named(), "width": width, "height": height}
        if side != config.resolution:
            facts["resolution"] = side
        passes = self.passes(options.get("num_steps"))
        if passes is not None:
            return {**facts, "passes": passes}
        return facts | {
            "steps": options.get("num_steps") or self.default_passes or sampling.num_steps,
            "guidance": sampling.guidance if options.get("guidance") is None else options["guidance"],
            "sampler": options.get("sampler") or sampling.sampler,
            "guide": options.get("guide") or sampling.guide,
        }

    def made_of(self, source: bytes, prompt: str, seed: int, settings: UpscaleSettings) -> dict[str, Any]:
        """What an image file that `upscale` enlarged says of how it was made, and its source of how that was."""
        from pipeline.inference.upscaling import own_steps, own_strength

        config = self.snapshot.config
        steps = own_steps(config) if settings.num_steps is None else settings.num_steps
        low = settings.sigma_low
        return self._named() | {
            "prompt": prompt,
            "seed": seed,
            "factor": settings.factor,
            "steps": steps,
            "strength": own_strength(config, steps) if low is None else low,
            "project": settings.project,
            "of": {"sha256": hashlib.sha256(source).hexdigest(), "made": read_made(source)},
        }

    def _named(self) -> dict[str, Any]:
        return {"model": self.address, "digest": self.snapshot.digest}

    def upscale(
        self,
        image: NDArray[np.uint8],
        prompt: str = "",
        seed: int = 0,
        settings: UpscaleSettings | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Enlarge an image uint8 [H,W,3] of any size (`inference.upscaling.upscale`; None: its defaults).

        Raises ConfigError for values that are out of range, and for a model that cannot upscale.
        """
        from pipeline.inference.upscaling import UpscaleSettings, shells_for, upscale

        settings = settings or UpscaleSettings()
        shells_for(self.snapshot, settings.factor)
        check_seed(seed)
        check_count(settings.num_steps)
        if settings.sigma_low is not None and not MIN_STRENGTH <= settings.sigma_low <= MAX_STRENGTH:
            problem, fix = f"{settings.sigma_low} is out of range", f"choose {MIN_STRENGTH} to {MAX_STRENGTH}"
            raise ConfigError("E-CFG-052", "strength", problem, fix)
        return upscale(self.snapshot, image, self.text([prompt]), seed, settings, on_progress)

    def text(self, prompts: Sequence[str]) -> Conditioning:
        """Encoded prompts; an empty one means no caption."""
        import torch

        from pipeline.models.conditioning import Conditioning
        from pipeline.text.captions import normalise

        encoded = self.encoder.encode([normalise(prompt) for prompt in prompts])
        return Conditioning(*map(torch.from_numpy, encoded))


def load_generator(
    folder: str | Path, device: str = "cpu", default_passes: int | None = None, address: str = ""
) -> Generator:
    """Load and verify a snapshot folder and the encoder it names.

    Raises:
        InputMissing, StorageError: there is no snapshot, or its files differ from its manifest.
        StorageError: the text encoder installed here is not the one that the model was trained with.
    """
    from pipeline.models.snapshot import load_snapshot
    from pipeline.text.load import encoder_of

    snapshot = load_snapshot(folder, device)
    encoder = encoder_of(snapshot.config.text_encoder, str(folder))
    return Generator(snapshot, encoder, default_passes, address)


def shape_of(snapshot: Snapshot, size: tuple[int, int]) -> Shape:
    """The shape of images of `size`, (width, height) in px, that a model makes. Raises ConfigError for sides that
    it cannot have."""
    from pipeline.config.sides import side_unit
    from pipeline.models.shape import Shape

    config, most = snapshot.config, MAX_STRETCH * snapshot.resolution
    unit = side_unit(config.core.resolution, config.core.net, [shell.net for shell in config.shells])
    if any(side % unit or not 0 < side <= most for side in size):
        width, height = (min(max(round(side / unit), 1) * unit, most) for side in size)
        problem = f"{size[0]}x{size[1]} px: sides of this model are multiples of {unit}, up to {most} px"
        raise ConfigError("E-CFG-058", "size", problem, f"choose {width}x{height}")
    return Shape(size[1] / snapshot.resolution, size[0] / snapshot.resolution)


def check_steps(snapshot: Snapshot, num_steps: int | None) -> int | None:
    """`num_steps` if the model can be sampled in as many steps or passes, or None. Raises ConfigError."""
    config = snapshot.config
    if num_steps is not None and config.is_refined and num_steps not in config.passes:
        known = ", ".join(map(str, config.passes))
        problem = f"{num_steps} is not a number of passes that this model was trained for"
        raise ConfigError("E-CFG-041", "steps", problem, f"choose one of: {known}")
    return check_count(num_steps)


def check_count(num_steps: int | None) -> int | None:
    """`num_steps` if it is a possible number of steps, or None. Raises ConfigError."""
    if num_steps is not None and not 1 <= num_steps <= 1000:
        raise ConfigError("E-CFG-041", "steps", f"{num_steps} is out of range", "choose 1 to 1000")
    return num_steps


def check_guidance(guidance: float | None) -> None:
    """Raises ConfigError for a strength that is not finite, or below 0; None is the model's own."""
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise ConfigError("E-CFG-045", "guidance", f"{guidance} is out of range", "choose 0 or more")


def check_name(what: str, name: str | None, known: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not among `known`; None is the model's own."""
    if name in RENAMED_GUIDES:
        raise ConfigError("E-CFG-046", what, f"{name!r} was renamed", f"write {RENAMED_GUIDES[name]}")
    if name is not None and name not in known:
        raise ConfigError("E-CFG-046", what, f"{name!r} is unknown", f"choose one of: {', '.join(known)}")


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed outside 0 ... 2^63 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError("E-CFG-042", "seed", f"{seed} is out of range", f"choose 0 to {MAX_SEED}")


def tile(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """uint8 [N,3,R,R] as one image [3,H,W]: row by row, white between and in empty places.

    As torchvision.utils.make_grid, which leaves out the border of a single image; and registered models do without
    torchvision."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    pitch_y, pitch_x = height + padding, width + padding
    grid = images.new_full((3, rows * pitch_y + padding, columns * pitch_x + padding), 255)
    for i, image in enumerate(images):
        y, x = (i // columns) * pitch_y + padding, (i % columns) * pitch_x + padding
        grid[:, y : y + height, x : x + width] = image
    return grid
