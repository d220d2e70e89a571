"""`crescendo promote`, and the choice of the model for `generate` and `upscale`."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.project import find_root, folder_name, locate

if TYPE_CHECKING:
    from pipeline.inference.generator import Generator
    from pipeline.registry.package import Registry

FINETUNED = "models/finetuned"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `promote`."""
    promote = commands.add_parser(
        "promote",
        help="register models/refined; make it the champion if its verdict passed",
        description="Registers models/refined as the candidate, and moves the alias `champion` to it if "
        "reports/verdict.json follows from its evidence, passed, and compares it with the current champion. "
        "If not, ends with status 1 and names the rules that failed or are undecided. A version that is registered "
        "already, such as a copy from another store, is judged from the evidence that is stored with it.",
    )
    promote.add_argument(
        "model", nargs="?", metavar="MODEL", help="models:/NAME/3 (default: register this project's model)"
    )
    promote.add_argument(
        "--to", metavar="ALIAS", default="champion", help="the alias to move (default: champion)"
    )
    promote.add_argument(
        "--expect", metavar="VERSION", help="only if the alias points to this version, or to `none`"
    )
    promote.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")
    promote.add_argument(
        "--allow-candidate", action="store_true", help="end with status 0 even if it stays the candidate"
    )
    promote.set_defaults(run=_promote)


def _promote(args: argparse.Namespace) -> int:
    from pipeline.config.params import load_params
    from pipeline.registry.promote import Request, promote

    if not re.fullmatch(r"(?!v\d+$|latest$)[a-z][a-z0-9_-]{0,99}", args.to, re.ASCII | re.IGNORECASE):
        fix = "write a word of up to 100 letters, digits, - and _, but not `latest` or `v1`"
        raise ConfigError("E-CFG-065", "--to", f"{args.to!r} cannot be an alias", fix)
    request = Request(args.to, args.expect, args.dry_run, args.allow_candidate)
    if args.model is None:
        promote(find_root(), load_params(), request)
    else:
        from pipeline.registry.promote_version import promote_version

        promote_version(find_root(), args.model, request)
    return 0


def load_model(model: str | None, root: Path) -> Generator:
    """The model at `model`, by default the champion, the candidate or models/refined; prints which one."""
    from pipeline.inference.generator import load_generator

    if model is not None and not model.startswith("models:"):
        print(f"model: {model}")
        folder = locate(model, root)
        return load_generator(folder, address=folder_name(folder, root))
    uri = model or _best(root)
    if uri is None:
        from pipeline.registry.promote import MODEL

        print(f"model: {MODEL} (nothing is registered)")
        return load_generator(root / MODEL, address=MODEL)
    from pipeline.registry.package import Registry

    return _load_registered(Registry(root), uri)


def load_upscaler(root: Path) -> Generator:
    """The model to upscale with by default: that of `load_model`, or models/refined where that was refined from it
    and is recorded to upscale better; a refined model without such a record gives way to models/finetuned."""
    from pipeline.registry.promote import MODEL

    if _best(root) is None and not (root / MODEL).exists():
        return load_model(FINETUNED, root)
    generator = load_model(None, root)
    config = generator.snapshot.config
    if not config.is_refined and _upscales_better(root / MODEL, generator.snapshot.digest):
        print(f"note: {MODEL}, which was refined from it, upscales better", file=sys.stderr)
        return load_model(MODEL, root)
    if config.is_refined and config.upscale_steps is None:
        print("note: its record does not say that it upscales better than models/finetuned", file=sys.stderr)
        return load_model(FINETUNED, root)
    return generator


def _upscales_better(refined: Path, parent: str) -> bool:
    """Whether a folder holds a model that was refined from the one of digest `parent` and is recorded to upscale
    better than that one."""
    from pipeline.models.snapshot import read_config

    if not (refined / "config.json").is_file():
        return False
    config = read_config(refined / "config.json")
    return config.upscale_steps is not None and config.lineage.parent == parent


def _load_registered(registry: Registry, uri: str) -> Generator:
    from pipeline.inference.generator import load_generator
    from pipeline.registry import champions

    version = champions.resolve(registry, uri)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        snapshot = registry.fetch(version, Path(folder))
        generator = load_generator(snapshot, default_passes=version.default_passes, address=version.uri)
    print(f"model: {uri}, version {version.number} ({generator.snapshot.digest[:12]})")
    if generator.default_passes is None and generator.snapshot.config.is_refined:
        note = "no number of passes of this model passed its evaluation; its default is the fewest"
        print(f"note: {note}", file=sys.stderr)
    return generator


def _best(root: Path) -> str | None:
    """Address of the champion, else of the candidate; None if nothing is registered. Raises InputMissing where
    there was a champion, and it is gone."""
    from pipeline.tracking import store

    if not store.store_exists(root):
        return None
    from pipeline.config.params import load_params
    from pipeline.registry import champions
    from pipeline.registry.package import CANDIDATE, CHAMPION, Registry

    name = load_params(root / "params.yaml").promotion.name
    registry = Registry(root)
    aliases = registry.aliases(name)
    gone = None if CHAMPION in aliases else champions.find_gone(registry, name, CHAMPION)
    if gone is not None:
        raise champions.gone_error(name, CHAMPION, gone)
    return next((f"models:/{name}@{alias}" for alias in (CHAMPION, CANDIDATE) if alias in aliases), None)
