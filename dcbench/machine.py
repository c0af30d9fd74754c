"""The machine of a run: hardware, package versions, peak memory, commit."""

import contextlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")  # of Linux
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


def namesake() -> str:
    """The version of the other project called "dcbench" on PyPI, if it is installed; "" otherwise.

    It has the same import name, so either package overwrites files of the other. This one is called dcbench-i2v.
    """
    try:
        found = importlib.metadata.metadata("dcbench")
    except importlib.metadata.PackageNotFoundError:
        return ""
    ours = "image-to-video" in (found["Summary"] or "")  # an installation from before the new name
    return "" if ours else found["Version"]


def hardware(device: str) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def processor() -> str:
    """The processor's name, such as "AMD EPYC 7763 64-Core Processor". Where the system has none, its architecture."""
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            if name:
                return name
    return platform.processor() or platform.machine()


def forget_peak_memory() -> None:
    """Reset the peak, so that one model's peak is not recorded for the next model in the same process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # only Linux has it; elsewhere the peak is not reset
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak of the GPU if one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def git_commit() -> str:
    """The commit if dcbench runs from a git checkout, else ''."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
