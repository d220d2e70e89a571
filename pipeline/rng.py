"""Random streams: every random number comes from a generator keyed by what it is for, never by a global state.

The key is (seed, purpose, nimg, shard), where `nimg` is the number of training images seen and a shard is a
fixed slice of the global batch. A resumed run therefore has nothing to restore, and the streams do not
depend on how many workers share the batch.
"""

import hashlib

import torch


def key(seed: int, purpose: str, nimg: int = 0, shard: int = 0) -> int:
    """Return a 63-bit integer that depends on all four parts of the key."""
    text = f"{seed}/{purpose}/{nimg}/{shard}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator_for(
    seed: int, purpose: str, nimg: int = 0, shard: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a fresh generator for one purpose at one moment of training; on the CPU for the device `meta`, whose
    tensors have no values."""
    place = "cpu" if torch.device(device).type == "meta" else device
    return torch.Generator(place).manual_seed(key(seed, purpose, nimg, shard))
