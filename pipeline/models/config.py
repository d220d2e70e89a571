"""config.json of a snapshot: how to build its networks, how to sample them, and where they come from.

The file is parsed once, by `SnapshotConfig.from_json`, which alone knows what older files lack or name differently.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config.renamed import RENAMED_GUIDES
from pipeline.models.statistics import Statistics


@dataclass(frozen=True)
class SamplerSettings:
    """How a core or a fine-tuned model is sampled; the defaults are plain Heun without guidance."""

    num_steps: int
    sampler: str = "heun"  # one of samplers.SAMPLERS, or ADAPTIVE
    guide: str = "unconditional"  # one of guidance.GUIDES
    guidance: float = 1.0  # 1 = off
    guidance_interval: tuple[float, float] = (0.0, float("inf"))  # of noise levels, as the core sees them
    # A shell starts where the noise is this multiple of its high band's RMS: one for all shells, or one each.
    handover: tuple[float, ...] = (8.0,)
    early_exit: bool = False  # finished tiles of the finest level are not computed any more
    schedule: str = "geometric"  # one of schedule.SCHEDULES
    shell_steps: int = 4  # of each shell, at most

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "SamplerSettings":
        """Parse `sampling` of a config.json. Older files lack sampler, guide, early exit and schedule, name some
        differently, or hold one handover as a number."""
        handover = tree["handover"] if "handover" in tree else tree["lift"]
        guide = tree.get("guide", "unconditional")
        low, high = tree["guidance_interval"]
        return cls(
            num_steps=tree["num_steps"],
            sampler=tree.get("sampler", "heun"),
            guide=RENAMED_GUIDES.get(guide, guide),
            guidance=tree["guidance"],
            guidance_interval=(low, high),
            handover=tuple(handover) if isinstance(handover, list | tuple) else (handover,),
            early_exit=tree.get("early_exit", tree.get("finish", False)),
            schedule=tree.get("schedule", cls.schedule),
            shell_steps=tree.get("shell_steps", cls.shell_steps),
        )


@dataclass(frozen=True)
class CoreConfig:
    """A core: px of its images, and the keyword values of its `UNet`."""

    resolution: int
    net: Mapping[str, Any]


@dataclass(frozen=True)
class ShellConfig:
    """A shell: the variance of the high band of real images, and the keyword values of its `ShellNet`."""

    high_band_variance: float
    net: Mapping[str, Any]


@dataclass(frozen=True)
class Lineage:
    """Digests of what a model was made from; None where unknown, or for a core, which has no parent."""

    data: str | None = None
    validation: str | None = None
    parent: str | None = None
    init_from: str | None = None  # address of the model that finetune grew
    init_sha256: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """What is known, and the parent."""
        return {name: value for name, value in asdict(self).items() if value is not None or name == "parent"}


@dataclass(frozen=True)
class SnapshotConfig:
    """All of config.json."""

    kind: str  # "core", "finetuned" or "refined"
    core: CoreConfig
    shells: tuple[ShellConfig, ...]  # coarse first
    text_encoder: Mapping[str, Any]  # name, dim, sha256 and what else identifies it
    statistics: Statistics
    sampling: SamplerSettings
    lineage: Lineage = field(default_factory=Lineage)
    ema_std: float | None = None  # relative width of the weight average; not of refined models
    passes: tuple[int, ...] = ()  # of refined models
    sigma_start: float | None = None  # noise level at which a refined model starts
    upscale_steps: int | None = None  # in which a refined model upscales; None: others do that better
    contrast: float = 1.0  # factor of standardised samples (pipeline/diffusion/contrast.py)
    extra: Mapping[str, Any] = field(default_factory=dict)  # other entries, kept as they are

    @property
    def is_refined(self) -> bool:
        """Whether the model makes an image in a few passes, with guidance built in."""
        return self.kind == "refined"

    @property
    def resolution(self) -> int:
        """px of the finest level."""
        return self.core.resolution << len(self.shells)

    @property
    def text_dim(self) -> int:
        """Width of a caption's vectors."""
        return int(self.text_encoder["dim"])

    @property
    def learned_to_upscale(self) -> bool:
        """Whether a shell was trained on low bands with a noise level of their own."""
        return any(shell.net.get("bands") for shell in self.shells)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "SnapshotConfig":
        """Parse the content of a config.json. Raises KeyError, TypeError or ValueError if it is not one."""
        entries = dict(tree)
        del entries["resolution"]  # that of the finest level
        statistics = entries.pop("statistics")
        return cls(
            kind=entries.pop("kind"),
            core=CoreConfig(**entries.pop("core")),
            shells=tuple(ShellConfig(**shell) for shell in entries.pop("shells")),
            text_encoder=entries.pop("text_encoder"),
            statistics=Statistics(tuple(statistics["mean"]), tuple(statistics["std"])),
            sampling=SamplerSettings.from_json(entries.pop("sampling")),
            lineage=Lineage(**entries.pop("lineage", {})),
            ema_std=entries.pop("ema_std", None),
            passes=tuple(entries.pop("passes", ())),
            sigma_start=entries.pop("sigma_start", None),
            upscale_steps=entries.pop("upscale_steps", None),
            contrast=entries.pop("contrast", 1.0),
            extra=entries,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of config.json; `from_json` gives an equal object back."""
        optional = {
            "ema_std": self.ema_std,
            "passes": list(self.passes) or None,
            "sigma_start": self.sigma_start,
            "upscale_steps": self.upscale_steps,
            "contrast": self.contrast if self.contrast != 1 else None,
        }
        return {
            "kind": self.kind,
            "resolution": self.resolution,
            "core": asdict(self.core),
            "shells": [asdict(shell) for shell in self.shells],
            "text_encoder": dict(self.text_encoder),
            "statistics": self.statistics._asdict(),
            "sampling": asdict(self.sampling),
            "lineage": self.lineage.to_json(),
            **{name: value for name, value in optional.items() if value is not None},
            **self.extra,
        }
