"""Where a figure was measured, and with what."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


def describe() -> str:
    """Return the processor or GPU, memory and versions, in one line."""
    cores = psutil.cpu_count()
    processor = _processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    memory = psutil.virtual_memory().total / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "tying"))
    return f"{cores} cores of {processor}{gpu}, {memory:.0f} GiB; Python {platform.python_version()}, {packages}"


def supports_bf16() -> bool:
    """Tell whether this processor computes in bfloat16 rather than emulating it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
