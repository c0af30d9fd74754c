"""One training loop for every stage: accumulation, clipping, EMA, mixed precision, exact resume, data parallelism.

The random numbers of step k come from a generator seeded by (seed, stage, k, part of the batch, rank). So no random
state has to be saved: on one machine, with the same number of threads, a resumed training ends with the same bits as
one without interruption.
"""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dcbench.errors import UserError
from dcbench.facts import Facts
from dcbench.files import atomic_write
from dcbench.seeding import clip_seed
from dcbench.training.directory import StageFolder
from dcbench.weights import read_file


class LoopConfig(Facts):
    """How a stage optimises. What it optimises is its task."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # over all processes and accumulated parts
    lr: float = Field(gt=0)  # of AdamW
    muon_lr: float = Field(default=0.0, ge=0)  # > 0: Muon trains the task's matrices, with the schedule of `lr`
    final_lr: float | None = None  # cosine from lr to this; None = constant
    warmup: int = 0  # steps
    weight_decay: float = 0.0  # of AdamW only
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no limit
    accumulate: int = Field(default=1, ge=1)  # parts of a batch, one after the other
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay of the moving average of the parameters; 0 = no average
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    save_every: int = 500  # steps
    log_every: int = 20  # steps

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then constant or a cosine."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.final_lr is None:
            return self.lr * rise
        done = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return rise * (self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2)


class Task(nn.Module):
    """What one stage learns."""

    def forward(self, batch_size: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Losses by name, each a scalar, of a batch that `rng` draws. "loss" is minimised, the others are logged."""
        raise NotImplementedError

    def matrices(self) -> set[str]:
        """Names of the parameters that Muon may train: weights between hidden layers."""
        return {name for name, p in self.named_parameters() if p.ndim >= 2}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the constants of torch.optim.Muon, for matrices, and kernels as [out, in * size].

    At the tiny scale the model learns from captions in a third of the steps that AdamW needs (docs/training.md).
    torch.optim.Muon takes only matrices, one by one in bfloat16; a processor without bfloat16 units then spends half of
    a step there.
    """

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, kernels: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(kernels), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}  # one product for all matrices of a shape
            for kernel in group["params"]:
                if kernel.grad is not None:
                    alike.setdefault(kernel.flatten(1).shape, []).append(kernel)
            for (rows, columns), kernels in alike.items():
                updates = orthogonalise(torch.stack([self._momentum(kernel).flatten(1) for kernel in kernels]))
                for kernel, update in zip(kernels, updates, strict=True):
                    kernel.add_(update.view_as(kernel), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _momentum(self, kernel: nn.Parameter) -> Tensor:
        """Nesterov momentum: the gradient, moved towards the running average of all gradients."""
        assert kernel.grad is not None
        average = self.state[kernel].setdefault("momentum_buffer", torch.zeros_like(kernel))
        average.lerp_(kernel.grad, 1 - self.MOMENTUM)
        return kernel.grad.lerp(average, self.MOMENTUM)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with singular values near 1 (0.7 to 1.2): five Newton-Schulz steps of fifth order."""
    a, b, c = Muon.COEFFICIENTS
    if tall := matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimisers(task: Task, trained: Mapping[str, nn.Parameter], config: LoopConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the task's matrices and AdamW for the rest."""
    matrices = task.matrices() & set(trained) if config.muon_lr else set()
    # foreach: one call for all tensors, several times faster than a loop over many small ones
    rest = [p for name, p in trained.items() if name not in matrices]
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW(rest, config.lr, config.betas, weight_decay=config.weight_decay, foreach=True))
    if matrices:
        made.append(Muon([trained[name] for name in sorted(matrices)], config.muon_lr))
    return made


@dataclass(frozen=True)
class Process:
    """This process, one of those that torchrun started; without torchrun the only one."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[Process]:
    """Join the processes that torchrun has started, if it has started this one."""
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world == 1:
        yield Process(0, 1, torch.device(device) if device != "auto" else local)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Process(rank, world, local)
    finally:
        dist.destroy_process_group()


class Average:
    """Exponential moving average of the trained parameters, in float32. Its decay grows in the first steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in parameters.items():
            self.values[name].lerp_(p.detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, p in parameters.items():
            p.copy_(self.values[name])


class DamagedState(UserError):
    """A file with the state of a training that cannot be read."""


class Learner:
    """The trained parameters and all that changes with them: optimisers, loss scaler, moving average."""

    def __init__(self, task: Task, config: LoopConfig, device: torch.device) -> None:
        self.trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        if not self.trained:
            raise UserError("this stage trains no parameter: check its `train` list of roles")
        if config.muon_lr and config.precision == "float16":
            raise UserError("muon_lr and precision float16 do not go together: choose bfloat16 or float32")
        self.config, self.device = config, device
        self.optimisers = make_optimisers(task, self.trained, config)
        self.peaks = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.average = Average(self.trained, config.ema) if config.ema else None

    def accumulate(self, model: nn.Module, seed: int, step: int, process: Process) -> dict[str, float]:
        """Add up the gradients of one step over the parts of its batch; returns the mean of each named loss."""
        sums: dict[str, float] = {}
        parts, precision = self.config.accumulate, self.config.precision
        amp, dtype = precision != "float32", getattr(torch, precision)
        for i in range(parts):
            draw = clip_seed(seed, f"{step}/{i}/{process.rank}")
            torch.manual_seed(draw)  # for dropout layers, which take no generator
            rng = torch.Generator().manual_seed(draw)
            no_sync = model.no_sync() if isinstance(model, DistributedDataParallel) and i < parts - 1 else None
            with no_sync or contextlib.nullcontext(), torch.autocast(process.device.type, dtype, enabled=amp):
                losses = model(self.config.batch_size // (parts * process.world), rng)
                self.scaler.scale(losses["loss"] / parts).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / parts
        return sums

    def update(self, step: int) -> float:
        """Apply the gradients of step 0, 1, ... and clear them; returns their norm before clipping."""
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * self.config.lr_at(step) / self.config.lr
        for optimiser in self.optimisers if self.scaler.is_enabled() else ():
            self.scaler.unscale_(optimiser)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip or math.inf))
        if self.config.precision == "float32" and not math.isfinite(norm):
            raise UserError(f"step {step}: the gradient is not finite; lower the learning rate ({self.config.lr:g})")
        for optimiser in self.optimisers:
            self.scaler.step(optimiser)
        self.scaler.update()
        for p in self.trained.values():
            p.grad = None
        if self.average:
            self.average.update(self.trained, step + 1)
        return norm

    def save(self, path: Path, identity: str, step: int, seconds: float) -> None:
        """Write what `load` needs. `identity` names the settings, `seconds` is the processor time so far."""
        state = {
            "identity": identity,
            "step": step,
            "seconds": seconds,
            "parameters": {name: p.detach() for name, p in self.trained.items()},
            "average": self.average.values if self.average else {},
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": self.scaler.state_dict(),
        }
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, identity: str) -> tuple[int, float]:
        """Read a saved state; returns its step and its processor seconds. UserError if its identity is another one.

        DamagedState, before anything is changed, if the file is no whole state.
        """
        try:
            state = read_file(path, self.device)
        except UserError as error:
            raise DamagedState(str(error)) from None
        needed = {"identity", "step", "seconds", "parameters", "average", "optimisers", "scaler"}
        if not isinstance(state, dict) or needed - state.keys():
            raise DamagedState(f"{path} is no state of a training")
        if state["identity"] != identity:
            raise UserError(
                f"{path} was made with other settings; choose another --out, or remove {path.parent} to start anew"
            )
        for name, p in self.trained.items():
            p.data.copy_(state["parameters"][name])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.values = state["average"]
        return state["step"], state["seconds"]


def fit(
    task: Task,
    config: LoopConfig,
    files: StageFolder,
    seed: int,
    process: Process,
    stop_after: float | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    identity: Mapping[str, Any] | None = None,
    caught: list[int] | None = None,
) -> bool:
    """Train the parameters of `task` that require gradients; at the end they are set to their EMA. True when finished.

    Continues from the state in `files` if there is one; UserError if it was saved under another `identity`. Stops after
    `stop_after` seconds, or at Ctrl-C and SIGTERM, with a state to continue from. The log has a line for every
    `log_every` steps; `on_step` is called with the number of the step and this line. `caught`: the signals that
    `catch_signals` of the caller collects; a state that cannot be read is set aside, and the stage begins anew.
    """
    parts = process.world * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {process.world} processes x "
            f"{config.accumulate} accumulated parts; choose a multiple of {parts}"
        )
    learner, step, seconds = Learner(task, config, process.device), 0, 0.0
    key = json.dumps(identity or {}, sort_keys=True, default=str)
    if files.state.is_file():
        try:
            step, seconds = learner.load(files.state, key)
        except DamagedState as error:
            if process.first:
                files.set_state_aside(str(error))
    if process.first:
        files.trim_log(step)
    model: nn.Module = task
    if process.world > 1:
        model = DistributedDataParallel(task, device_ids=[process.device] if process.device.type == "cuda" else None)
    task.train()
    started, cpu, since = time.perf_counter(), time.process_time(), step
    finished = step >= config.steps
    with catch_signals(caught) as interrupted:
        while not finished:
            losses = learner.accumulate(model, seed, step, process)
            norm = learner.update(step)
            step += 1
            finished = step >= config.steps
            took, burnt = time.perf_counter() - started, time.process_time() - cpu
            stopping = agree(bool(interrupted) or (stop_after is not None and took > stop_after), process)
            if process.first and (step % config.log_every == 0 or finished or stopping):
                line = {"step": step, "lr": config.lr_at(step - 1), "grad_norm": norm, **losses}
                line["clips_per_second"] = round((step - since) * config.batch_size / took, 3)
                line["cpu_seconds"] = round(seconds + burnt, 1)
                files.add_to_log(line)
                if on_step:
                    on_step(step, line)
            if process.first and (step % config.save_every == 0 or finished or stopping):
                learner.save(files.state, key, step, seconds + burnt)
            if stopping:
                break
    if learner.average:
        learner.average.copy_to(learner.trained)
    task.eval()
    return finished


def agree(stop: bool, process: Process) -> bool:
    """True on every process when one has to stop. If only that one stopped, the others would wait for it for ever."""
    if process.world == 1:
        return stop
    flag = torch.tensor(float(stop), device=process.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag > 0)


@contextlib.contextmanager
def catch_signals(caught: list[int] | None = None) -> Iterator[list[int]]:
    """Numbers of SIGINT and SIGTERM as they come, so that a step can end and be saved. A second one stops at once.

    Afterwards both do what they did before. `caught`: the list of a caller that catches them already.
    """
    if caught is not None or threading.current_thread() is not threading.main_thread():
        yield [] if caught is None else caught
        return
    numbers: list[int] = []

    def catch(number: int, frame: object) -> None:
        if numbers:
            raise KeyboardInterrupt
        numbers.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plot_log(logs: Mapping[str, Sequence[Mapping[str, float]]], target: Path) -> None:
    """A picture of the loss at each step: one curve for each named log, given as its lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, lines in logs.items():
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(target, dpi=120)
