"""Commands that analyse a model: λ of each layer, sweeps, ablation suites."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcbench.cli.options import Data, DatasetName, Device, Limit, Model, ProtocolName, Settings
from dcbench.errors import UserError

if TYPE_CHECKING:
    from dcbench.analysis.suite import Suite

probe = typer.Typer(no_args_is_help=True, help="Show and sweep the learned λ of a DynamiCrafter.")

SuiteOut = Annotated[Path | None, typer.Option("--out", help="Default: runs/<suite>-<model>-<dataset>.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Repeatable: a run per arm and seed. Default: 123.")]


def _run(
    suite: "Suite",
    model: str,
    dataset: str,
    protocol: str | None,
    data: Path | None,
    out: Path | None,
    seeds: list[int] | None,
    limit: int | None,
    settings: list[str] | None,
    device: str,
) -> None:
    from dcbench.analysis.ablation import run_suite
    from dcbench.catalogue import find_dataset, find_model, with_overrides
    from dcbench.protocol import find_protocol
    from dcbench.runs.run import Options

    card, data_card = with_overrides(find_model(model), settings or []), find_dataset(dataset)
    folder = out or Path("runs") / f"{suite.name}-{card.name}-{data_card.name}"
    chosen = find_protocol(protocol or data_card.protocol)
    run_suite(suite, card, data_card, chosen, folder, Options(device), seeds or [123], limit, None, data)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"report: {folder}")


def ablate(
    suite: Annotated[str, typer.Argument(help="table3-training, table3-knockout, sampling, lambda, or suite.toml.")],
    model: Model = "dynamicrafter",
    dataset: DatasetName = "msrvtt",
    protocol: ProtocolName = None,
    data: Data = None,
    out: SuiteOut = None,
    seed: Seeds = None,
    limit: Limit = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Run all arms of a suite on the same clips; print a table with the paper's numbers. The same command continues."""
    from dcbench.analysis.suite import find_suite

    _run(find_suite(suite), model, dataset, protocol, data, out, seed, limit, settings, device)


@probe.command("lambda")
def probe_lambda(
    model: Model = "dynamicrafter",
    layers: Annotated[
        list[str] | None, typer.Option("--layers", help="Sweep: ends, intermediate, all, or 3,4,5; repeatable.")
    ] = None,
    factors: Annotated[str, typer.Option("--factors", help="Sweep: factors on λ, comma-separated.")] = "0,0.5,1,1.5,2",
    metrics: Annotated[
        str, typer.Option("--metrics", help="Sweep: comma-separated.")
    ] = "fvd,pic,ssim_image,motion,clip_text",
    dataset: DatasetName = "msrvtt",
    protocol: ProtocolName = None,
    data: Data = None,
    out: SuiteOut = None,
    seed: Seeds = None,
    limit: Limit = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Show the learned λ of each layer and the paper's Fig. 2. With --layers, also run a sweep."""
    from dcbench.analysis import lambda_probe
    from dcbench.catalogue import find_model, load_entry_point, with_overrides
    from dcbench.runs.run import Options

    card = with_overrides(find_model(model), settings or [])
    built = load_entry_point(card)(card, Options(device).runtime())
    folder = out or Path("runs") / f"lambda-{card.name}"
    print(lambda_probe.write_profile(built, folder))
    print(f"report: {folder}")
    if layers:
        try:
            numbers = [float(factor) for factor in factors.split(",")]
        except ValueError as error:
            raise UserError(f'--factors "{factors}": expected numbers such as 0,0.5,1,2') from error
        suite = lambda_probe.sweep(layers, numbers, tuple(metrics.split(",")), built)
        _run(suite, model, dataset, protocol, data, folder, seed, limit, settings, device)
