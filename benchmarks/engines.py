"""What several processes cost: uv run python benchmarks/engines.py [--clips 1000] [--cases 10000]

Prints milliseconds a clip that each way of making clips adds to the model `still` at 16x16 (one process, a shard, two
shards at once, joining), seconds to plan many cases and to ask for the status of a run of so many, and the memory that
scoring takes for few and for many pairs.
"""

import argparse
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dcbench.catalogue import find_dataset, find_model
from dcbench.protocol import find_protocol
from dcbench.runs import planning
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score
from dcbench.runs.status import status

OPTIONS = Options(device="cpu", quiet=True)


def plan(out: Path, clips: int) -> Run:
    small = find_protocol("smoke").model_copy(
        update={"height": 16, "width": 16, "num_frames": 4, "split": "train", "num_clips": clips, "datasets": {}}
    )
    return planning.plan(find_model("still"), find_dataset("shapes"), small, out=out, quiet=True)


def in_processes(work: Callable[[int], object], count: int) -> None:
    context = multiprocessing.get_context("fork")
    several = [context.Process(target=work, args=(number,)) for number in range(1, count + 1)]
    for process in several:
        process.start()
    for process in several:
        process.join()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def engines(folder: Path, clips: int) -> None:
    def run(name: str, work: Callable[[Run], object]) -> None:
        planned = plan(folder / name, clips)
        print(f"{name:<24} {1000 * timed(lambda: work(planned)) / clips:.2f} ms a clip")

    run("one process", lambda run: sample(run, OPTIONS))
    run("shard 1/1", lambda run: sample(run, replace(OPTIONS, shard=(1, 1))))
    run("join, alone", lambda run: sample(run, replace(OPTIONS, join=True)))
    run("2 shards at once", lambda run: in_processes(lambda n: sample(run, replace(OPTIONS, shard=(n, 2))), 2))
    run("2 that join", lambda run: in_processes(lambda n: sample(run, replace(OPTIONS, join=True)), 2))


def many(folder: Path, cases: int) -> None:
    out = folder / "many"
    print(f"plan {cases} cases         {timed(lambda: plan(out, cases)):.2f} s")
    run = plan(out, cases)
    sample(run, OPTIONS)
    print(f"status of {cases} clips    {timed(lambda: status(out)):.2f} s")
    for count in (cases // 10, cases):
        few = Run(run.directory, run.plan, run.cases[:count], run.protocol, run.items, run.model)
        process = multiprocessing.get_context("fork").Process(target=_score, args=(few,))
        process.start()
        process.join()


def _score(run: Run) -> None:
    score(run, OPTIONS, ["first_frame_psnr"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"scoring {len(run.cases):>6} pairs    {peak:.0f} MiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description="What several processes cost.")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=10000)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dcbench-engines-"))
    try:
        engines(folder, given.clips)
        many(folder, given.cases)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
