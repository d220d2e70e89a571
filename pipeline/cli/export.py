"""`crescendo export`: a model as files that need nothing of this project."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli.models import load_model
from pipeline.project import find_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export`."""
    export = commands.add_parser(
        "export",
        help="write a model as ONNX, a torch.export program and safetensors, with a card",
        description="Writes a folder that runs without this project: the generator with its passes unrolled as "
        "ONNX and as a program of torch.export, the text encoder, the weights, a card for the Hugging Face hub and "
        "a script. The programs are run and compared with the model; the folder appears only if they agree.",
    )
    export.add_argument("folder", type=Path, metavar="FOLDER", help="to write; also the name on the card")
    export.add_argument(
        "--model",
        help="models:/NAME@ALIAS, models:/NAME/3 or a folder (champion, candidate or models/refined)",
    )
    export.add_argument(
        "--steps",
        type=int,
        help="passes of a refined model, sampler steps of others (the model's own default)",
    )
    export.add_argument(
        "--licence", metavar="TEXT", help="of the model, for the card (that of data/prepared)"
    )
    export.add_argument("--force", action="store_true", help="replace an earlier export")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from pipeline.export.export import check_folder, export

    root, folder = find_root(), args.folder.absolute()
    check_folder(folder, args.force)
    generator = load_model(args.model, root)
    trained_on = generator.snapshot.config.lineage.data
    export(generator, folder, args.steps, args.licence or _licence(root, trained_on), args.force)
    print(f"wrote {args.folder}")
    return 0


def _licence(root: Path, trained_on: str | None) -> str | None:
    """The licence of the prepared data, where the model was trained on these."""
    from pipeline import artifacts

    folder = root / "data/prepared"
    if trained_on is None or not (folder / artifacts.MANIFEST).is_file():
        return None
    manifest = artifacts.read_manifest(folder)
    return manifest["meta"].get("licence") if manifest["digest"] == trained_on else None
