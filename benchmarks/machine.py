"""Where a figure was measured, and with what."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "torchmetrics", "torchvision", "einops", "jsonargparse", "numpy", "tying")


def machine() -> dict[str, Any]:
    """Return the processor or GPU, memory, threads of computation, and versions."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "hardware": f"{os.cpu_count()} cores of {_processor()}{gpu}, {memory:.0f} GiB",
        "threads": torch.get_num_threads(),
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def describe() -> str:
    """Return the machine in one line."""
    return in_words(machine())


def in_words(machine: dict[str, Any]) -> str:
    """Return what :func:`machine` returned, in one line."""
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("Python", "torch", "lightning", "tying"))
    return f"{machine['hardware']}; {versions}"


def peak_memory() -> int:
    """Return the most bytes of memory this process has held at a time: on the GPU, where it uses one."""
    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return held
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
