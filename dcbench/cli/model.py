"""Commands around one model: animate a picture, train a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from dcbench.cli.options import Data, Device, Download, Dtype, Model, Seed, Settings, run_options
from dcbench.errors import UserError


def animate(
    image: Annotated[Path | None, typer.Argument(help="A picture; not needed with --story.")] = None,
    prompt: Annotated[str, typer.Argument(help="What happens in the video.")] = "",
    out: Annotated[Path, typer.Option("--out", help="The video: .mp4, .gif or .webm.")] = Path("animation.mp4"),
    model: Model = "dynamicrafter",
    end_image: Annotated[Path | None, typer.Option("--end-image", help="The last frame of the video.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Make a loop: end with the first frame.")] = False,
    story: Annotated[Path | None, typer.Option("--story", help="A YAML file of scenes, joined into one video.")] = None,
    num: Annotated[int, typer.Option("--num", help="Number of videos, each with its own noise.")] = 1,
    seed: Seed = 123,
    fps: Annotated[
        float | None, typer.Option("--fps", help="Frames per second of the video. Default: the model's own.")
    ] = None,
    motion: Annotated[
        int | None, typer.Option("--motion", help="The model's motion condition: frame stride (256) or fps (others).")
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    dtype: Dtype = None,
    download: Download = False,
) -> None:
    """Animate a picture by a prompt, fill in between two pictures, make a loop, or join the scenes of a story."""
    from dcbench import animate
    from dcbench.catalogue import find_model, with_overrides

    runtime = run_options(device, dtype, 1, download).runtime()
    card = with_overrides(find_model(model), settings or [])
    if story is not None:
        if image is not None or end_image is not None or loop or num != 1:
            raise UserError("with --story, leave out the image, --end-image, --loop and --num")
        paths = [animate.tell(card, story, out, runtime=runtime, seed=seed, fps=fps, motion=motion)]
    elif image is None:
        raise UserError('give a picture and a prompt: dcbench animate photo.png "a boat sails" --out boat.mp4')
    else:
        paths = animate.animate(
            card,
            image,
            prompt,
            out,
            runtime=runtime,
            end_image=end_image,
            loop=loop,
            seed=seed,
            num=num,
            fps=fps,
            motion=motion,
        )
    print("\n".join(str(path) for path in paths))


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or recipe.toml.")],
    out: Annotated[Path | None, typer.Option("--out", help="Default: runs/train-<recipe>.")] = None,
    data: Data = None,
    stage: Annotated[list[str] | None, typer.Option("--stage", help="Only this stage; repeatable.")] = None,
    device: Device = "auto",
    stop_after: Annotated[float | None, typer.Option("--stop-after", help="Stop after this many seconds.")] = None,
) -> None:
    """Train the stages of a recipe. The same command continues a stopped training. Use torchrun for several GPUs."""
    from dcbench.training import run
    from dcbench.training.recipe import find_recipe

    found = find_recipe(recipe)
    folder = out or Path("runs") / f"train-{found.name}"

    def show(name: str, step: int, steps: int, line: dict[str, float]) -> None:
        values = "  ".join(f"{key} {value:.4g}" for key, value in line.items() if key != "step")
        print(f"{name} {step}/{steps}  {values}", flush=True)

    finished = run.train(found, folder, data, tuple(stage) if stage else None, device, stop_after, show)
    state = "finished" if finished else "stopped; the same command continues it"
    print(f"{state}: {folder} (weights, logs and loss.png)")
