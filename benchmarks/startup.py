"""Times `--help` and `list` against a bare interpreter: uv run python benchmarks/startup.py"""

import statistics
import subprocess
import sys
import time

PROGRAM = "from dcbench.cli import main; main()"
COMMANDS = {
    "python -c pass": ["pass"],
    "dcbench --help": [PROGRAM, "--help"],
    "dcbench list models": [PROGRAM, "list", "models"],
    "dcbench list protocols": [PROGRAM, "list", "protocols"],
    "python -c 'import torch'": ["import torch"],
}


def main() -> None:
    for name, arguments in COMMANDS.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", *arguments], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        print(f"{name:<28} median {statistics.median(seconds):.2f} s, best {min(seconds):.2f} s")


if __name__ == "__main__":
    main()
