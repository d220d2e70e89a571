"""Registered models after their promotion: `crescendo rollback`, `history`, `verify`, `fsck`, `trace`, `diff`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.project import find_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    rollback = commands.add_parser(
        "rollback",
        help="make the former champion the champion again",
        description="Moves the alias `champion` back to the version that had it before, once its files are "
        "verified.",
    )
    rollback.add_argument("--to", metavar="VERSION", help="to this version, which was the champion once")
    _add_name(rollback)
    rollback.set_defaults(run=_rollback)
    history = commands.add_parser("history", help="who registered and promoted which version when")
    _add_name(history)
    history.set_defaults(run=_history)
    verify = commands.add_parser(
        "verify",
        help="check the files of registered models against their digests",
        description="Checks every version that an alias points to. Ends with status 74 if one does not verify, or "
        "the champion is gone.",
    )
    verify.add_argument("--all", action="store_true", help="check every version")
    _add_name(verify)
    verify.set_defaults(run=_verify)
    fsck = commands.add_parser(
        "fsck",
        help="tidy up what a killed promotion left in the registry",
        description="Completes the journal of a promotion that was killed, removes half-uploaded models, ends runs "
        "that were left, and says what it did. Waits for promotions that are running.",
    )
    _add_name(fsck)
    fsck.set_defaults(run=_fsck)
    copy = commands.add_parser(
        "copy",
        help="copy a registered model to another store",
        description="Copies the files of a version byte for byte, verifies them on both sides, and registers them "
        "at the target with the same tags, and where they come from. A model that is there already stays the "
        "version that it is. No alias is moved.",
    )
    copy.add_argument("model", metavar="MODEL", help="models:/NAME/3 or models:/NAME@ALIAS")
    copy.add_argument(
        "--to",
        required=True,
        metavar="URI",
        help="http://HOST:PORT of a server, or sqlite:////FOLDER/mlflow.db",
    )
    copy.set_defaults(run=_copy)
    sign = commands.add_parser(
        "sign",
        help="sign a registered model with a key file",
        description="Signs the files of a version in the format of OpenSSF Model Signing. Where "
        "CRESCENDO_PUBLIC_KEY names the public key, no registered model is loaded, promoted or copied without such "
        "a signature.",
    )
    sign.add_argument("model", metavar="MODEL", help="models:/NAME/3 or models:/NAME@ALIAS")
    sign.add_argument("--key", required=True, type=Path, metavar="FILE", help="private key, PEM")
    sign.set_defaults(run=_sign)
    _add_trace(commands)
    _add_diff(commands)


def _add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = commands.add_parser(
        "trace",
        help="where a registered model, or a picture, comes from",
        description="Shows code, data, runs, parents and verdict of a version, and who promoted it when, from the "
        "registry alone. Of a picture, also how it was made.",
    )
    trace.add_argument(
        "what",
        metavar="MODEL|FILE",
        help="models:/NAME@champion, models:/NAME/3 or a PNG file that crescendo made",
    )
    trace.add_argument("--json", action="store_true", help="print it for programs")
    trace.set_defaults(run=_trace)


def _add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diff = commands.add_parser(
        "diff",
        help="compare two registered models",
        description="Prints what differs between two versions, and writes a page with their parameters, data, "
        "rules and images of equal captions and seeds.",
    )
    diff.add_argument("first", metavar="MODEL", help="models:/NAME/3")
    diff.add_argument("second", metavar="MODEL", help="models:/NAME@champion")
    diff.add_argument("--prompts", nargs="+", metavar="PROMPT", help="default: captions of the test split")
    diff.add_argument("--out", default="diff.html", help="the page (default: diff.html)")
    diff.set_defaults(run=_diff)


def _add_name(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--name",
        help="of the registered model, outside of a project (default: promotion.name in params.yaml)",
    )


def _name(given: str | None = None) -> str:
    from pipeline.config.params import load_params

    if given is not None:
        if not re.fullmatch("[A-Za-z0-9_-]{1,100}", given):
            fix = "write up to 100 letters, digits, - and _"
            raise ConfigError("E-CFG-193", "--name", f"{given!r} cannot be a model's", fix)
        return given
    return load_params(find_root() / "params.yaml").promotion.name


def _rollback(args: argparse.Namespace) -> int:
    from pipeline.registry.champions import rollback

    rollback(find_root(), _name(args.name), args.to)
    return 0


def _history(args: argparse.Namespace) -> int:
    from pipeline.registry.history import describe

    for line in describe(find_root(), _name(args.name)):
        print(line)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pipeline.registry.repair import verify

    verify(find_root(), _name(args.name), args.all)
    return 0


def _copy(args: argparse.Namespace) -> int:
    from pipeline.registry.copying import copy

    copy(find_root(), args.model, args.to)
    return 0


def _sign(args: argparse.Namespace) -> int:
    from pipeline.registry.copying import sign_version

    sign_version(find_root(), args.model, args.key)
    return 0


def _fsck(args: argparse.Namespace) -> int:
    from pipeline.registry.repair import fsck

    fsck(find_root(), _name(args.name))
    return 0


def _trace(args: argparse.Namespace) -> int:
    from pipeline.registry.picture import draw_picture, trace_picture
    from pipeline.registry.trace import draw, trace

    root, of_version = find_root(), args.what.startswith("models:")
    if of_version:
        facts = trace(root, args.what)
        facts["served"] = _served(root, facts["digest"])
    else:
        facts = trace_picture(root, Path(args.what), _name())
    if args.json:
        print(json.dumps(facts, indent=1, sort_keys=True))
    else:
        print("\n".join(draw(facts) if of_version else draw_picture(facts)))
    return 0


def _served(root: Path, digest: str) -> list[str]:
    """Where the project at `root` serves the model of this digest on this machine; nowhere without a project."""
    if not (root / "infra/compute").is_dir():
        return []
    from pipeline.compute import load_profile
    from pipeline.launch.stage import runs_folder
    from pipeline.serving.announce import running

    return [each.url for each in running(runs_folder(root, load_profile(root))) if each.digest == digest]


def _diff(args: argparse.Namespace) -> int:
    from pipeline.registry.diff import compare, describe, write_page

    difference = compare(find_root(), args.first, args.second)
    print("\n".join(describe(difference)))
    write_page(find_root(), difference, Path(args.out), args.prompts)
    print(f"wrote {args.out}")
    return 0
