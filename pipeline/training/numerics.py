"""What the last bits of a run depend on besides its parameters, data and code: precision, device and library.

Checkpoints remember it, so that a run which goes on elsewhere can say that its bits may differ.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")


def precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto` is bfloat16 where the hardware computes in it."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def numerics(device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, str]:
    """The precision, device, version of torch and whether it compiles, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "precision": str(dtype).removeprefix("torch."),
        "device": name,
        "torch": torch.__version__,
        "compile": str(compiled).lower(),
    }


def cpu_name() -> str:
    """The model of the CPU, and the instructions that torch uses of it, which differ with the machine."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"{model[1] if model else 'CPU'} ({torch.backends.cpu.get_cpu_capability()})"


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is different now, in words; nothing where all that is known is the same."""
    names = [name for name in now if before.get(name, now[name]) != now[name]]
    return ", ".join(f"{name} is {now[name]}, was {before[name]}" for name in names)
