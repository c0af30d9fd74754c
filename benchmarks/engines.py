"""What several processes cost: uv run python benchmarks/engines.py [--clips 1000] [--cases 10000] [--ray]

Prints milliseconds a clip that each way of making clips adds to the model `still` at 16x16 (one process, a shard, two
shards at once, joining), seconds to plan many cases and to ask for the status of a run of so many, and the memory that
scoring takes for few and for many pairs.

--ray: only Ray, on this machine. Milliseconds a clip of one process and of one and two workers, after the first clip,
for `still` and for a model that waits 0.2 s a clip, with the load of the machine.
"""

import argparse
import importlib
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dcbench.catalogue import find_dataset, find_model, slug
from dcbench.protocol import find_protocol
from dcbench.runs import planning
from dcbench.runs.run import OnRay, Options, Run
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score
from dcbench.runs.status import status

OPTIONS = Options(device="cpu", quiet=True)


def plan(out: Path, clips: int, model: str = "still") -> Run:
    small = find_protocol("smoke").model_copy(
        update={"height": 16, "width": 16, "num_frames": 4, "split": "train", "num_clips": clips, "datasets": {}}
    )
    return planning.plan(find_model(model), find_dataset("shapes"), small, out=out, quiet=True)


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


WAITS = """
import time

class Waits:
    conditions_on = frozenset({"image"})
    def __init__(self, card, runtime):
        self.card = card
    def generate(self, requests):
        time.sleep(0.2 * len(requests))
        return [request.image[None].repeat(request.num_frames, 1, 1, 1) for request in requests]
"""


def on_ray(folder: Path, clips: int) -> None:
    ray = importlib.import_module("ray")
    (folder / "waits.py").write_text(WAITS)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", include_dashboard=False, log_to_driver=False, object_store_memory=80 * 1024 * 1024)
    for model in ("still", f"{folder / 'waits.py'}:Waits"):
        for workers in (0, 1, 2):
            name = f"{workers} workers of Ray" if workers else "one process"
            planned = plan(folder / f"{slug(model)}-{workers}", clips, model)
            options = replace(OPTIONS, ray=OnRay(workers=workers) if workers else None)
            sample(planned, options)
            times = [path.stat().st_mtime for path in (planned.directory.path / "clips").iterdir()]
            each = 1000 * (max(times) - min(times)) / (clips - 1)
            print(f"{find_model(model).name:<8} {name:<18} {each:.2f} ms a clip, load {os.getloadavg()[0]:.1f}")
    ray.shutdown()


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
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dcbench-engines-"))
    try:
        if given.ray:
            on_ray(folder, given.clips)
        else:
            engines(folder, given.clips)
            many(folder, given.cases)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
