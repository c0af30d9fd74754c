"""The commands data, cache and doctor."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcbench.cli.options import Data, Limit, ProtocolName, Seed
from dcbench.errors import UserError
from dcbench.escape import screen

if TYPE_CHECKING:
    from dcbench.catalogue import ClipShape

data = typer.Typer(no_args_is_help=True, help="Make or verify a dataset's files.")
cache = typer.Typer(no_args_is_help=True, help="List or empty the feature cache.")
doctor = typer.Typer(invoke_without_command=True, help="Show what is installed, what is missing, and how to get it.")


@data.command("make")
def data_make(
    dataset: Annotated[str, typer.Argument(help="A procedural dataset, shapes; or physics-iq, vbench-i2v.")],
    layout: Annotated[str | None, typer.Option("--layout", help="Of shapes: ucf101 or msrvtt.")] = None,
    videos: Annotated[
        int | None,
        typer.Option(
            "--videos", min=1, max=1_000_000, help="Of shapes: number of videos; half are for the test split."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Default: data/<layout>.")] = None,
    size: Annotated[
        int | None,
        typer.Option("--size", min=16, max=2048, help="Height of the frames, or of wide pictures, in pixels."),
    ] = None,
) -> None:
    """Write a procedural dataset as video files in the official layout of another dataset."""
    if dataset in ("physics-iq", "vbench-i2v"):
        if layout is not None or videos is not None:
            raise UserError(f"dcbench data make {dataset} has one layout and one number of items; leave both out")
        target = out or Path("data") / dataset
        print(_make_suite(dataset, target, size) + f" --dataset {dataset} --data {target}")
        return
    if layout is None or videos is None:
        raise UserError(f"dcbench data make {dataset} needs --layout (ucf101 or msrvtt) and --videos")
    from dcbench.catalogue import find_dataset
    from dcbench.datasets.base import load_dataset
    from dcbench.datasets.make import make

    card = find_dataset(dataset)
    if size is not None:
        if "size" not in card.options:
            raise UserError(f"{card.name} has no option size")
        card = card.model_copy(update={"options": card.options | {"size": size}})
    target = out or Path("data") / layout
    counts = make(load_dataset(card), card, layout, videos, target)
    parts = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{parts} videos are in {target}. Use them: dcbench run --model zoom --dataset {layout} --data {target}")


def _make_suite(dataset: str, out: Path, size: int | None) -> str:
    """Write a made-up suite of a benchmark. Returns what was written, and how to use it, up to the data set."""
    if dataset == "physics-iq":
        from dcbench.datasets import made_events

        count = made_events.make_suite(out, size or made_events.HEIGHT)
        return f"{count} videos are in {out}. Use them: dcbench run --model still"
    from dcbench.datasets import made_pictures

    count = made_pictures.make_suite(out, size or made_pictures.SIDE)
    return f"{count} prompts are in {out}. Use them: dcbench run --model zoom --samples 1"


@data.command("verify")
def data_verify(
    dataset: Annotated[str, typer.Argument(help="A name, alias or card.toml.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of its files.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Default: every split.")] = None,
    min_frames: Annotated[int, typer.Option("--min-frames", help="Report shorter videos.")] = 16,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Decoding processes.")] = 2,
    unusable: Annotated[
        Path | None, typer.Option("--unusable", help="Write the paths of videos that training must leave out here.")
    ] = None,
) -> None:
    """Decode every video; list broken, damaged, short, duplicated and missing ones. Exit code 1 if there are any."""
    from dcbench.catalogue import find_dataset
    from dcbench.datasets.base import find_root, load_dataset
    from dcbench.datasets.verify import verify
    from dcbench.errors import near_match
    from dcbench.files import write_text

    card = find_dataset(dataset)
    root = find_root(card, data)
    source = load_dataset(card, root)
    splits = source.splits()
    if split is not None and split not in splits:
        raise UserError(f'{card.name} has no split "{split}".{near_match(split, splits)} It has: {", ".join(splits)}.')
    chosen = [split] if split else ["all"] if "all" in splits else list(splits)
    results = [verify(source, name, root, min_frames, workers) for name in chosen]
    if unusable:
        write_text(unusable, "".join(f"{path}\n" for result in results for path in result.unusable))
    print(screen("\n\n".join(result.text() for result in results)))
    if not all(result.ok for result in results):
        raise typer.Exit(1)


@data.command("inputs")
def data_inputs(
    dataset: Annotated[str, typer.Argument(help="A name, alias or card.toml.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    protocol: ProtocolName = None,
    data: Data = None,
    limit: Limit = None,
    seed: Seed = 123,
    size: Annotated[
        str | None,
        typer.Option("--size", help="WIDTHxHEIGHT of the system's clips, for vbench-i2v: the pictures depend on it."),
    ] = None,
) -> None:
    """Write the protocol's input images and prompts as files, for a system that dcbench cannot run."""
    from dcbench.catalogue import find_dataset
    from dcbench.protocol import find_protocol
    from dcbench.runs.inputs import write_inputs

    card = find_dataset(dataset)
    count = write_inputs(card, find_protocol(protocol or card.protocol), out, data, seed, limit, shape=_shape(size))
    where = (f" --data {data}" if data else "") + (f" --protocol {protocol}" if protocol else "")
    print(
        f"{count} inputs are in {out}: inputs.jsonl names images and prompts. Put a video for each, with the "
        f"name `file` of its line, into a folder CLIPS, then:\n"
        f"  dcbench run --model CLIPS --dataset {dataset}{where} --manifest {out / 'manifest.jsonl'}"
    )


def _shape(text: str | None) -> "ClipShape | None":
    """The size of clips, from "512x320"."""
    from dcbench.catalogue import ClipShape

    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text.strip().lower())
    if found is None:
        raise UserError(f"--size {text!r}: expected WIDTHxHEIGHT in pixels, such as 1280x720")
    return ClipShape(width=int(found[1]), height=int(found[2]))


@cache.command("list")
def cache_list() -> None:
    """List the entries of the cache by extractor."""
    from collections import Counter

    from dcbench.metrics.cache import FeatureCache

    store = FeatureCache()
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for entry in store.entries():
        counts[entry.kind] += 1
        sizes[entry.kind] += entry.size
    for kind in sorted(counts):
        print(f"{kind}  {counts[kind]} clips  {sizes[kind] / 1e6:.1f} MB")
    print(f"{sum(counts.values())} entries, {sum(sizes.values()) / 1e6:.1f} MB in {store.root}")


@cache.command("prune")
def cache_prune(
    older_than: Annotated[float, typer.Option("--older-than", min=0, help="Days; 0 removes everything.")],
) -> None:
    """Remove entries of at least this age in days. They are computed again when needed."""
    from dcbench.metrics.cache import FeatureCache

    count, size = FeatureCache().prune(older_than)
    print(f"{count} entries removed, {size / 1e6:.1f} MB freed")


@doctor.command("protocol")
def doctor_protocol(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this choice; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=4, help="Maximum number of clips.")] = None,
    i3d: Annotated[list[Path] | None, typer.Option("--i3d", help="Another I3D weight file; repeatable.")] = None,
) -> None:
    """Find why two numbers differ: score the same clips with other common choices, one at a time."""
    from dcbench.analysis.sensitivity import measure
    from dcbench.files import write_text
    from dcbench.runs.run import Options

    text = measure(run, Options(), only, limit, i3d or ()).markdown()
    write_text(run / "report" / "sensitivity.md", text)
    print(f"{text}\nreport: {run / 'report' / 'sensitivity.md'}")


@doctor.callback()
def doctor_overview(context: typer.Context) -> None:
    """Show what is installed, what is missing, and how to get it."""
    if context.invoked_subcommand is not None:
        return
    import importlib.util
    import os

    import torch

    from dcbench.catalogue import DatasetCard, MetricCard, cards, load_entry_point
    from dcbench.datasets.base import find_root
    from dcbench.files import cache_dir
    from dcbench.machine import namesake
    from dcbench.models.base import Runtime
    from dcbench.models.baselines.diffusers import INSTALL
    from dcbench.video import has_decord

    os.environ["HF_HUB_OFFLINE"] = "1"
    if other := namesake():
        print(
            f"WARNING: another project, dcbench {other} of PyPI, is installed and has the same import name. "
            "Remove it, and install this one again: pip uninstall dcbench, then pip install '.' in the clone"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; cache {cache_dir()}")
    print(f"decoders: PyAV{', decord' if has_decord() else ' (decord is not installed)'}")
    diffusers = importlib.util.find_spec("diffusers") is not None
    print(f"baselines: {'diffusers is here' if diffusers else INSTALL}")
    for kind, found in (("metrics", cards("metrics")), ("datasets", cards("datasets"))):
        print(f"\n{kind}")
        missing: dict[str, list[str]] = {}  # what is missing -> the cards that need it
        for card in found.values():
            try:
                if isinstance(card, MetricCard):
                    load_entry_point(card)(card, Runtime(offline=True))
                elif isinstance(card, DatasetCard) and card.name != "folder":
                    find_root(card, None)
                print(f"  ready    {card.name}")
            except UserError as error:
                missing.setdefault(str(error), []).append(card.name)
        for text, needed in missing.items():
            print(f"  missing  {', '.join(needed)}: {_advice(text, needed[0])}")
    print("\nmodels and their weights: dcbench weights list")


def _advice(text: str, name: str) -> str:
    """What is missing and how to get it: with the name to fetch, and no size where none is known."""
    lines = screen(text.replace("fetch NAME", f"fetch {name}")).split("\n")
    known = [re.sub(r"(?<=[(: ])unknown size, ", "", line) for line in lines]
    file = known[0].partition(" is missing")[0]
    shown = [re.sub(rf"^(\s*){re.escape(file)}: .*?, from ", r"\1from ", line) for line in known]  # said in line 1
    return "\n           ".join(shown)
