"""Between dcbench's requests file and the command lines of repositories: `python adapters.py NAME REQUESTS OUTPUT`.

Runs in the repository's own environment and folder, whose Python may be 3.8: standard library alone, no dcbench.
Configurations are written as JSON, which every YAML reader reads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List  # noqa: UP035 (Python 3.8)

Request = Dict[str, Any]  # noqa: UP006
TOGETHER = 50  # clips that ConsistI2V makes in one process: it keeps them all in memory until the end


def run(*command: str) -> None:
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def the_only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"expected one {pattern} in {folder}, found {len(found)}")
    return found[0]


def finish(made: Path, output: Path, clip_id: str) -> None:
    """Move a whole clip to its place under a name that appears at once."""
    waiting = output.parent / f"{clip_id}{made.suffix}.part"
    shutil.move(str(made), str(waiting))
    os.replace(str(waiting), str(output / f"{clip_id}{made.suffix}"))


def videocomposer(requests: list[Request], output: Path, work: Path) -> None:
    """One process a clip. Text and the image alone guide (`y`, `local_image`); no input video.

    Needs the line in docs/baselines.md that saves clip.npy: the repository itself writes a GIF of 256 colours, with the
    conditions beside the clip.
    """
    for request in requests:
        folder = work / request["clip_id"]
        folder.mkdir()
        config = folder / "image_only.yaml"
        settings = {
            "TASK_TYPE": "SINGLE_TASK",
            "ENABLE": True,
            "DATASET": "webvid10m",
            "network_name": "UNetSD_temporal",
            "video_compositions": [
                "text", "mask", "depthmap", "sketch", "motion", "image", "local_image", "single_sketch",
            ],  # what the checkpoint was trained with: they shape the network
            "guidances": ["y", "local_image"],
            "read_image": True,
            "read_style": False,
            "read_sketch": False,
            "save_origin_video": False,
            "batch_sizes": {"1": 1, "4": 1, "8": 1, "16": 1},
            "vit_image_size": 224,
            "resume": True,
            "resume_step": 228000,
            "resume_checkpoint": "model_weights/non_ema_228000.pth",
            "num_workers": 0,
            "mvs_visual": False,
            "chunk_size": 1,
            "num_steps": 1,
            "ddim_timesteps": request["sampling"]["steps"],
            "log_dir": str(folder),
        }  # fmt: skip
        config.write_text(json.dumps(settings))
        seed = str(request["seed"] % 2**32)  # it also seeds numpy, which takes no more
        run(
            sys.executable, "run_net.py", "--cfg", str(config), "--seed", seed, "--input_video", "none",
            "--image_path", request["image"],
            "--input_text_desc=" + request["prompt"].replace("\0", " "),  # one argument: a prompt may begin with "-"
        )  # fmt: skip
        finish(the_only(folder, "*/clip.npy"), output, request["clip_id"])


def seine(requests: list[Request], output: Path, work: Path) -> None:
    """One process a clip; the image is stretched to 320 x 512, the size that ConsistI2V's authors evaluated."""
    for request in requests:
        folder = work / request["clip_id"]
        folder.mkdir()
        settings = {
            "ckpt": "pretrained/seine.pt",
            "pretrained_model_path": "pretrained/stable-diffusion-v1-4/",
            "input_path": request["image"],
            "save_path": str(folder),
            "model": "UNet",
            "num_frames": 16,
            "image_size": [320, 512],
            "use_fp16": True,
            "enable_xformers_memory_efficient_attention": True,
            "seed": request["seed"],
            "run_time": 1,
            "cfg_scale": request["sampling"]["guidance_scale"],
            "sample_method": "ddpm",
            "num_sampling_steps": request["sampling"]["steps"],
            "text_prompt": [""],  # becomes the file's name, which a long prompt or one with a slash breaks
            "additional_prompt": request["prompt"],
            "negative_prompt": "",
            "do_classifier_free_guidance": True,
            "mask_type": "first1",
            "use_mask": True,
        }
        config = folder / "config.yaml"
        config.write_text(json.dumps(settings))
        run(sys.executable, "sample_scripts/with_mask_sample.py", "--config", str(config))
        made = folder / f"{request['clip_id']}.mp4"
        os.replace(str(folder / ".mp4"), str(made))
        finish(made, output, request["clip_id"])


def consisti2v(requests: list[Request], output: Path, work: Path) -> None:
    """One process for up to 50 clips of one frame stride, which is a setting of the whole process."""
    by_stride: dict[int, list[Request]] = {}
    for request in requests:
        by_stride.setdefault(request["frame_stride"] or 3, []).append(request)
    parts = [
        (stride, some[k : k + TOGETHER]) for stride, some in by_stride.items() for k in range(0, len(some), TOGETHER)
    ]
    for number, (stride, some) in enumerate(parts):
        folder = work / str(number)
        folder.mkdir()
        prompts = {
            "seeds": [request["seed"] for request in some],
            "prompts": [request["prompt"] for request in some],
            "n_prompts": [""],
            "path_to_first_frames": [request["image"] for request in some],
        }
        config = folder / "prompts.yaml"
        config.write_text(json.dumps(prompts))
        sampling = some[0]["sampling"]
        run(
            sys.executable, "-m", "scripts.animate", "--inference_config", "configs/inference/inference.yaml",
            "--prompt_config", str(config), "--format", "mp4",
            f"output_dir={folder}", "output_name=clips", f"sampling_kwargs.frame_stride={stride}",
            f"sampling_kwargs.steps={sampling['steps']}",
            f"sampling_kwargs.guidance_scale_txt={sampling['guidance_scale']}",
            f"sampling_kwargs.guidance_scale_img={sampling['image_guidance_scale']}",
        )  # fmt: skip
        for index, request in enumerate(some):
            finish(the_only(folder, f"clips-*/sample/{index}-*.mp4"), output, request["clip_id"])


ADAPTERS: Dict[str, Callable[[List[Request], Path, Path], None]] = {  # noqa: UP006
    "videocomposer": videocomposer,
    "seine": seine,
    "consisti2v": consisti2v,
}


def main(arguments: list[str]) -> None:
    if len(arguments) != 3 or arguments[0] not in ADAPTERS:
        raise SystemExit(f"usage: adapters.py {'|'.join(ADAPTERS)} REQUESTS OUTPUT")
    name, requests, output = arguments
    wanted = [json.loads(line) for line in Path(requests).read_text(encoding="utf-8").split("\n") if line]
    with tempfile.TemporaryDirectory(dir=str(Path(output).parent)) as work:
        ADAPTERS[name](wanted, Path(output), Path(work))


if __name__ == "__main__":
    main(sys.argv[1:])
