"""Scoring two folders of videos: no model, no plan of a run; both sides are read by one protocol."""

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import dcbench
from dcbench import machine, planning, record, run, scoring, video
from dcbench.catalogue import find_dataset, slug
from dcbench.datasets.base import Item
from dcbench.errors import UserError
from dcbench.metrics.cache import FeatureCache
from dcbench.progress import track
from dcbench.protocol import Protocol, find_protocol, fingerprint, plan_clips
from dcbench.rundir import RunDirectory


def score_folders(
    generated: Path,
    reference: Path,
    protocol_name: str,
    options: run.Options,
    metrics: Sequence[str] | None = None,
    out: Path | None = None,
) -> Path:
    """Score every video of `generated` against those of `reference`; returns the directory of the record.

    Videos of one name on both sides are paired, for the metrics that compare a clip with its own input image.
    """
    start = time.perf_counter()
    protocol = find_protocol(protocol_name).resolved("folder")
    built = scoring.build_metrics(scoring.choose_metrics(metrics), options.runtime(), explicit=bool(metrics))
    sides = {"reference": _items(reference, protocol), "generated": _items(generated, protocol)}
    planned = {}
    for side, items in sides.items():
        probed = track(items.values(), len(items), f"reading {side} videos", quiet=options.quiet)
        planned[side] = plan_clips(protocol, list(probed), lambda item: item.video.info(), run_seed=0)
    entries = {side: {entry.id: entry for entry in chosen} for side, (chosen, _) in planned.items()}
    names = sorted({clip_id for table in entries.values() for clip_id in table})
    print_id = fingerprint(protocol, "folder", planned["reference"][0])
    pairs = [
        scoring.Pair(
            name,
            _reader(sides["reference"], entries["reference"].get(name), protocol),
            _reader(sides["generated"], entries["generated"].get(name), protocol),
            prompt=entries["reference"][name].prompt if name in entries["reference"] else None,
        )
        for name in names
    ]
    extracted = scoring.Extracted()
    for part in track(scoring.extract(pairs, built, FeatureCache()), len(pairs), "scoring", quiet=options.quiet):
        extracted.merge(part)
    scores = scoring.score(extracted, built, print_id, names, paired=False)
    excluded = [entry for _, lost in planned.values() for entry in lost]
    plan = record.Plan(
        dcbench=dcbench.__version__,
        model={"name": slug(generated.resolve().name), "title": generated.resolve().name},
        dataset={"name": "folder", "title": reference.resolve().name},
        protocol=protocol.model_dump(mode="json"),
        seed=0,
        limit=None,
        fingerprint=print_id,
        excluded=excluded,
        versions=machine.versions(),
    )
    failures = extracted.failures + [record.Failure(id=e.id, reason=e.reason) for e in excluded]
    hashes = record.digest([[name, extracted.pixels.get(name)] for name in names], 64)
    key = record.digest([hashes, protocol.identity()], 8)
    directory = RunDirectory(
        out or Path("runs") / f"{plan.model['name']}-against-{slug(reference.resolve().name)}-{key}"
    )
    with directory.locked():
        record.write_manifest(directory.manifest, planned["reference"][0])
        directory.write_per_clip(scoring.per_clip_rows(extracted, names))
        record.write_json(
            directory.record,
            record.Record(
                plan=plan,
                scores=dict(sorted(scores.items())),
                n_planned=len(entries["generated"]),
                n_scored=len(entries["generated"]) - len({failure.id for failure in extracted.failures}),
                failures=sorted(failures, key=lambda failure: failure.id),
                clips_sha256=hashes,
            ),
        )
        record.write_json(directory.cost, record.Cost(score_seconds=time.perf_counter() - start))
    return directory.path


def _items(folder: Path, protocol: Protocol) -> dict[str, Item]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected a folder of videos ({', '.join(video.SUFFIXES)})")
    return planning.load_items(find_dataset("folder"), folder, protocol)


def _reader(items: dict[str, Item], entry: record.ManifestItem | None, protocol: Protocol):
    if entry is None:
        return None
    item = items[entry.id]

    def read() -> Tensor:
        return run.reference_clip(item, entry, protocol)[0]

    return read
