"""A run's scores in VBench's own result file, and the zip that the leaderboard of VBench-I2V takes."""

import io
import json
import math
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcbench.camera import PHRASES, asked_class
from dcbench.catalogue import slug
from dcbench.datasets.vbench_i2v import DIMENSIONS
from dcbench.errors import UserError
from dcbench.files import atomic_write, write_text
from dcbench.record import Case, Record, read_per_clip, read_record
from dcbench.runs.planning import recorded_cases

NOT_IN_ZIP = "temporal_flickering"  # the leaderboard's script stops at it
CLIPS = 1118 * 5  # of the whole suite
DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold: the same run gives the same bytes


def write_results(run: Path, out: Path, partial: bool = False) -> str:
    """Write `NAME_eval_results.json` and `NAME.zip` to a folder. Returns what a user must know about them.

    Without the nine dimensions of the total there is no zip: the leaderboard's script counts a missing one as 0.
    `partial` True: there is one. UserError for a run of another data set, or without a dimension that has a score.
    """
    record = read_record(run)
    name, dataset = slug(str(record.plan.model["name"])), record.plan.dataset["name"]
    if dataset != "vbench-i2v":
        raise UserError(f"{run} is a run on {dataset}; --vbench takes runs on vbench-i2v")
    if not run.is_dir():
        raise UserError(f"{run}: --vbench takes the directory of a run, because the file lists every clip")
    cases, rows = recorded_cases(run), read_per_clip(run)
    results = {
        dimension: _result(dimension, score.value, cases, rows)
        for dimension in DIMENSIONS
        if (score := record.scores.get(dimension)) and score.value is not None
    }
    if not results:
        raise UserError(f"{run} has no score of a dimension of VBench-I2V; it needs one of: {', '.join(DIMENSIONS)}")
    file, archive = out / f"{name}_eval_results.json", out / f"{name}.zip"
    write_text(file, _json(results))
    submitted = {dimension: result for dimension, result in results.items() if dimension != NOT_IN_ZIP}
    missing = [dimension for dimension in DIMENSIONS if dimension not in results and dimension != NOT_IN_ZIP]
    lines = [f"{file}: {', '.join(f'{dim} ({len(result[-1])} clips)' for dim, result in results.items())}"]
    if missing and not partial:
        archive.unlink(missing_ok=True)
        lines.append(
            f"no zip: the leaderboard's script counts a missing dimension as 0, and {', '.join(missing)} "
            f"{'have' if len(missing) > 1 else 'has'} no score. --partial writes it all the same"
        )
    elif submitted:
        with atomic_write(archive) as temporary:
            temporary.write_bytes(_zip(file.name, _json(submitted)))
        of_zero = f"; the leaderboard's script counts as 0: {', '.join(missing)}" if missing else ""
        lines.append(f"{archive}: for the leaderboard, without {NOT_IN_ZIP}, which is in no total{of_zero}")
    return "\n".join([*lines, *_incomplete(record, cases)])


def _result(dimension: str, value: float, cases: list[Case], rows: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """[score, clips]; for camera_motion [score, score of each motion, clips]."""
    clips, of_motion = [], defaultdict[str, list[float]](list)
    for case in cases:
        observed = rows.get(case.id, {}).get(dimension, {})
        if "value" not in observed:
            continue
        file = f"{case.item_id}-{case.sample or 0}.mp4"
        clip = {"video_path": file, "video_results": _of_clip(dimension, float(observed["value"]))}
        if dimension.startswith("i2v_"):
            clip = {"image_path": case.video, **clip}
        if dimension == "camera_motion" and (motion := asked_class(case.prompt)):
            clip["prompt_type"] = motion
            of_motion[motion].append(float(observed["value"]))
        clips.append(clip)
    if dimension != "camera_motion":
        return [value, clips]
    means = {name: math.fsum(of_motion[name]) / len(of_motion[name]) for name in PHRASES.values() if of_motion[name]}
    return [value, means, clips]


def _of_clip(dimension: str, value: float) -> float | bool:
    """The value of a clip in VBench's unit: 0 to 100 for imaging_quality, true or false for dynamic_degree."""
    if dimension == "dynamic_degree":
        return value == 1
    return 100 * value if dimension == "imaging_quality" else value


def _incomplete(record: Record, cases: list[Case]) -> list[str]:
    """What a reader of the leaderboard could not know."""
    found = []
    if len(cases) != CLIPS:
        found.append(f"WARNING: {len(cases)} clips; the whole suite has {CLIPS}. This is no entry for the leaderboard")
    if lost := {failure.id for failure in record.failures}:
        found.append(f"WARNING: {len(lost)} clips are lost and not counted, for example {min(lost)}")
    return found


def _json(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=4, ensure_ascii=False, allow_nan=False) + "\n"


def _zip(name: str, text: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr(zipfile.ZipInfo(name, DATE), text, zipfile.ZIP_DEFLATED)
    return data.getvalue()
