"""Signatures of registered models, in the format of OpenSSF Model Signing, by a pair of keys in files.

A signature covers the name and the sha256 of every file of a version, and is kept as a tag of it, which travels
with copies. Where CRESCENDO_PUBLIC_KEY names a public key, nothing that is registered is loaded, promoted or copied
without a signature by its private key. Whoever can write to the registry can change files, digests and tags;
without the private key, not the signature.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, InputMissing, StorageError, reason
from pipeline.registry.packaging import ADDED

if TYPE_CHECKING:
    from model_signing.hashing import Config

SIGNATURE_TAG = "crescendo.signature"
PUBLIC_KEY = "CRESCENDO_PUBLIC_KEY"


def sign(folder: Path, private_key: Path) -> str:
    """The signature of the files in a folder by a private key (PEM, of an elliptic curve).

    Raises ConfigError for a key that cannot be used, InputMissing without the extra `signing`."""
    _require_package()
    from model_signing import signing

    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        path = Path(scratch) / "model.sig"
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise _no_key("--key", private_key, error, "private") from error
        signer.set_hashing_config(_hashing(folder)).sign(folder, path)
        return path.read_text()


def require(folder: Path, tags: Mapping[str, str], address: str) -> None:
    """Raise StorageError unless the files in `folder` of the version at `address` have the signature that its
    `tags` hold, by the key that PUBLIC_KEY names; nothing is asked for where it names none."""
    public_key = os.environ.get(PUBLIC_KEY)
    if not public_key:
        return
    _require_package()
    from model_signing import verifying

    signature, fix = tags.get(SIGNATURE_TAG), f"sign it: `crescendo sign {address} --key FILE`"
    if signature is None:
        raise StorageError("E-IO-091", address, f"is not signed, and {PUBLIC_KEY} asks for it", fix)
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _no_key(PUBLIC_KEY, Path(public_key), error, "public") from error
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        path = Path(scratch) / "model.sig"
        path.write_text(signature)
        try:
            verifier.set_hashing_config(_hashing(folder)).verify(folder, path)
        except Exception as error:  # whatever a signature that was made up makes of its parser
            problem = f"its signature is not of these files by the key {public_key}: {reason(error)}"
            raise StorageError(
                "E-IO-092", address, problem, "do not use it; copy or promote it again"
            ) from error


def _hashing(folder: Path) -> Config:
    """What is signed: all files but those that downloading them adds."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[Path(name) for name in ADDED], ignore_git_paths=False)


def _require_package() -> None:
    if importlib.util.find_spec("model_signing") is None:
        problem, fix = "model-signing is not installed", "pip install 'crescendo[signing]'"
        raise InputMissing("E-INP-089", "signature", problem, fix)


def _no_key(where: str, path: Path, error: Exception, kind: str) -> ConfigError:
    problem = f"{path} holds no {kind} key that can be used: {reason(error)}"
    fix = "make one: openssl ecparam -name prime256v1 -genkey -noout -out private.pem"
    return ConfigError("E-CFG-096", where, problem, fix)
