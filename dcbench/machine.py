"""The machine that a run uses: what it is called, which versions it has, how much memory was needed."""

import contextlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

import dcbench

RECORDED_VERSIONS = (
    "torch", "torchvision", "torchmetrics", "numpy", "av", "decord", "open_clip_torch", "dreamsim", "diffusers",
    "transformers",
)  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in RECORDED_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def forget_peak_memory() -> None:
    """Count from here, so that one model's peak is not written down for the next in the same process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux has it; elsewhere the count goes on
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Of the GPU where one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def git_commit() -> str:
    """The commit of a checkout that dcbench runs from; '' when it is installed."""
    here = Path(dcbench.__file__).parent
    if not (here.parent / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
