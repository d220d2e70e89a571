"""A model as a folder that needs nothing of this project: weights, programs, a card and a script.

The folder is a snapshot as well, so that `crescendo generate --model FOLDER` reads it. It appears as a whole, once
its programs have been run and compared with the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.errors import ConfigError, PipelineError, one_line
from pipeline.export.convert import differences, require_packages, write_programs
from pipeline.export.programs import ImageProgram, TextProgram
from pipeline.inference.generator import Generator, check_steps
from pipeline.models.snapshot import write_snapshot
from pipeline.rng import generator_for
from pipeline.text.minilm import MiniLM

FACTS = "export.json"
PROMPTS = ("grinning face", "", "a red circle")  # that programs are compared on
IMAGE_NAMES = (("pooled", "tokens", "mask", "noise"), ("images",))
TEXT_NAMES = (("ids", "mask"), ("pooled", "tokens"))
HUB_LICENCES = re.compile(r"apache-2\.0|mit|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0")


@dataclass(frozen=True)
class Licence:
    """Of the training data, as one reads it; its id on the hub, and a name where the hub has no id for it."""

    text: str | None
    hub_id: str
    name: str | None = None

    @classmethod
    def of(cls, text: str | None) -> Licence:
        """From a text such as "OpenMoji, CC BY-SA 4.0"."""
        if not text:
            return cls(None, "unknown")
        known = HUB_LICENCES.search(text.lower().replace(" ", "-"))
        return cls(one_line(text), known[0]) if known else cls(one_line(text), "other", one_line(text))


def export(
    generator: Generator,
    folder: Path,
    steps: int | None = None,
    licence: str | None = None,
    force: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Write `generator` to `folder`, in `steps` passes (None: the model's own); `log` gets what was measured.

    Raises ConfigError for a folder that holds something else, and for models and steps that cannot be exported;
    InputMissing without the extra `export`; StorageError where a program differs from the model."""
    check_folder(folder, force)
    require_packages()
    snapshot = generator.snapshot
    steps = check_steps(snapshot, steps if steps is not None else generator.default_passes)
    if snapshot.config.sampling.early_exit and not snapshot.config.is_refined:
        log("note: without early exit of tiles")
    program = ImageProgram(snapshot, steps)
    effort = generator.passes(steps) or steps or snapshot.config.sampling.num_steps
    with artifacts.commit_directory(folder, {"kind": snapshot.config.kind}) as target:
        early = snapshot.early.state_dict() if snapshot.early is not None else None
        write_snapshot(target, snapshot.denoiser, snapshot.config, early)
        facts = describe(generator, program, effort)
        facts["difference"] = write_all(target, generator, program, log)
        (target / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        shutil.copyfile(Path(__file__).with_name("example.py"), target / "generate.py")
        (target / "README.md").write_text(card(folder.name, generator, facts, Licence.of(licence)))
        write_digests(target)


def check_folder(folder: Path, force: bool) -> None:
    """Raise ConfigError unless `folder` is free: absent, empty, or with `force` an export and nothing else."""
    fix = "name another folder"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError("E-CFG-090", str(folder), "is not a folder", fix)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        earlier = FACTS in artifacts.verify_directory(folder)["files"]
    except PipelineError:
        earlier = False
    if not earlier:
        raise ConfigError("E-CFG-091", str(folder), "holds other files, or an export that was changed", fix)
    if not force:
        raise ConfigError("E-CFG-092", str(folder), "holds an export", f"{fix}, or replace it with --force")


def describe(generator: Generator, program: ImageProgram, effort: int) -> dict[str, Any]:
    """What a program needs to know of the inputs."""
    snapshot, info = generator.snapshot, generator.encoder.info
    facts = {
        "snapshot": snapshot.digest,
        "resolution": snapshot.resolution,
        "passes" if snapshot.config.is_refined else "steps": effort,
        "dim": int(info["dim"]),
        "tokens": int(info["max_tokens"]),
        "noise": [each._asdict() for each in program.noise],
        "noise_size": sum(program.sizes),
        "text": isinstance(generator.encoder, MiniLM),
    }
    return {**facts, "labels": list(info["labels"])} if "labels" in info else facts


def write_all(
    target: Path, generator: Generator, program: ImageProgram, log: Callable[[str], None]
) -> dict[str, float]:
    """Write all programs and the tokenizer; the largest difference of each."""
    labels = generator.encoder.info.get("labels")
    prompts = PROMPTS if labels is None else [*labels[:1], "", *labels[-1:]]
    text = generator.text(prompts)
    noise = torch.randn(len(prompts), sum(program.sizes), generator=generator_for(0, "export"))
    inputs: list[Tensor] = [text.pooled, text.tokens, text.mask, noise]
    write_programs(target, "generator", program, inputs, IMAGE_NAMES)
    found = differences(target, "generator", program, inputs)
    if isinstance(generator.encoder, MiniLM):
        encoder = TextProgram(generator.encoder)
        shutil.copyfile(generator.encoder.tokenizer_file, target / "tokenizer.json")
        ids, mask = generator.encoder.tokenize(prompts)
        write_programs(target, "text", encoder, [ids, mask], TEXT_NAMES)
        found |= differences(target, "text", encoder, [ids, mask])
    for name, value in found.items():
        unit = "of 255 grey levels" if name.startswith("generator") else "in vectors of unit length"
        log(f"{name}: differs from the model by at most {value:.2g} {unit}")
    return found


def card(name: str, generator: Generator, facts: dict[str, Any], licence: Licence) -> str:
    """README.md as the Hugging Face hub reads it."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    count = facts.get("passes") or facts["steps"]
    kind = "network pass" if "passes" in facts else "sampler step"
    labels = facts.get("labels") or []
    return environment.get_template("card.md.j2").render(
        name=name,
        facts={"labels": labels, **facts},
        has_text="labels" not in facts or bool(labels),
        effort=f"{count} {kind}" + ("" if count == 1 else "es" if kind.endswith("pass") else "s"),
        encoder=generator.encoder.info["name"].partition(":")[0],
        prompt=labels[0] if labels else PROMPTS[0],
        torch=".".join(torch.__version__.split(".")[:2]),
        licence=licence.text,
        license_id=licence.hub_id,
        license_name=licence.name,
    )


def write_digests(folder: Path) -> None:
    """manifest.sha256 of all files, as `sha256sum` reads it."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    lines = [f"{artifacts.sha256_file(path)}  {path.name}\n" for path in files]
    (folder / "manifest.sha256").write_text("".join(lines))
