"""`crescendo serve`: the champion as an HTTP service."""

from __future__ import annotations

import argparse
import contextlib

from pipeline.errors import ConfigError
from pipeline.project import find_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve`."""
    serve = commands.add_parser(
        "serve",
        help="serve the champion over HTTP, with a page to try it",
        description="Serves a model by OpenAI's images API, and a page at /. Follows an alias: when it moves, the "
        "new version is verified and swapped in. Listens on this machine alone, or asks for a token.",
    )
    serve.add_argument(
        "model",
        nargs="?",
        help="models:/NAME@ALIAS, which is followed, models:/NAME/3 or a folder (the champion)",
    )
    serve.add_argument("--port", type=int, default=8000, help="(8000); 0 is any that is free")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    serve.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    serve.add_argument("--poll", type=float, default=5.0, help="seconds between looks at the alias (5)")
    serve.add_argument("--queue", type=int, default=64, help="images that may wait (64)")
    serve.add_argument("--timeout", type=float, default=120.0, help="seconds that a request may take (120)")
    serve.add_argument("--rate", type=float, help="images a minute that a client may ask for (no limit)")
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from pipeline.compute import load_profile
    from pipeline.launch.stage import runs_folder
    from pipeline.serving.limits import Limits
    from pipeline.serving.server import Address, load_service, registered_champion, serve, token_for

    if not 0 <= args.port < 65536:
        raise ConfigError("E-CFG-133", "--port", f"{args.port} is no port", "choose 0 to 65535")
    for option in ("poll", "queue", "timeout", "rate"):
        value = getattr(args, option)
        if value is not None and not 0 < value < 1e6:
            raise ConfigError("E-CFG-134", f"--{option}", f"{value} is out of range", "choose more than 0")
    root = find_root()
    model = args.model or registered_champion(root)
    address = Address(args.host, args.port)

    def log(line: str) -> None:
        print(line, flush=True)

    token = token_for(address, log)
    limits = Limits(args.queue, args.timeout, args.rate)
    with address.listen() as sock:  # first, as loading a model takes seconds
        service = load_service(model, root, args.device, limits, args.poll)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            serve(service, sock, args.host, token, runs_folder(root, load_profile(root)), log)
    return 0
