"""Compares three ways in which idle OpenMP threads can wait, with `dcbench run` of a small network.

    uv run python benchmarks/waiting.py [--clips 8] [--rounds 2]

Prints wall and processor seconds of the whole command, and whether all settings wrote the same clips.
"""

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "sleep at once": {"OMP_WAIT_POLICY": "passive"},
    "dcbench's": {},
    "spin on": {"OMP_WAIT_POLICY": "active"},
}


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(settings: dict[str, str], clips: int) -> tuple[float, float, str]:
    """Wall seconds, processor seconds, digest of the clips."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | settings
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dcbench", "run", "--model", "dynamicrafter-tiny", "--dataset", "shapes"]
        command += ["--limit", str(clips), "--metrics", "motion", "--out", folder]
        start, before = time.perf_counter(), processor_seconds()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        wall, processor = time.perf_counter() - start, processor_seconds() - before
        made = sorted(Path(folder).rglob("clips/*"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in made if path.is_file())).hexdigest()
        return wall, processor, digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in SETTINGS}
    for _ in range(arguments.rounds):
        for name, settings in SETTINGS.items():
            found[name].append(run(settings, arguments.clips))
    for name, rounds in found.items():
        wall, processor = statistics.median(r[0] for r in rounds), statistics.median(r[1] for r in rounds)
        print(f"{name:<14} {wall:6.1f} s, {processor:6.1f} s of processors")
    print("the same clips:", len({digest for rounds in found.values() for *_, digest in rounds}) == 1)


if __name__ == "__main__":
    main()
