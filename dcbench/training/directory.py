"""A training's directory. Only this module knows the names of the files in it.

<out>/<stage>/   state.pt, log.jsonl, weights.safetensors, config.json
<out>/           weights.safetensors, config.json, start.json, loss.png, held_out.json, latents-<hash>.safetensors
"""

import json
import shutil
from pathlib import Path
from typing import Any

from dcbench.errors import UserError
from dcbench.files import atomic_write, read_json, read_jsonl, sha256_file, write_json, write_text
from dcbench.models.dynamicrafter.autoencoder import Autoencoder
from dcbench.weights import tensors_sha256


class StageFolder:
    """The files of one stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state.pt"  # to continue an unfinished stage
        self.log = path / "log.jsonl"
        self.config = path / "config.json"  # the model's configuration after the stage
        self.weights = path / "weights.safetensors"  # the parts that the stage trains; written last

    @property
    def finished(self) -> bool:
        return self.weights.is_file()

    def take(self, source: "StageFolder") -> None:
        """Copy the files of a finished stage, unless this one is finished. Does nothing if `source` is not finished."""
        if self.finished or not source.finished:
            return
        for file in (source.log, source.config, source.weights):  # not the state, which is large and no longer needed
            if file.is_file():
                with atomic_write(self.path / file.name) as temporary:
                    shutil.copyfile(file, temporary)

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of the log, without one that a crash has cut off."""
        return read_jsonl(self.log, torn=True) if self.log.is_file() else []

    def add_to_log(self, line: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def trim_log(self, step: int) -> None:
        """Remove the lines after `step`, from which the stage continues: those steps are done again."""
        if self.log.is_file():
            lines = [json.dumps(line) + "\n" for line in self.log_lines() if line["step"] <= step]
            write_text(self.log, "".join(lines))


class Training:
    """The files of a whole training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "weights.safetensors"  # the finished model, float16
        self.config = path / "config.json"
        self.starts = path / "start.json"  # sha256 of the files that the training began with
        self.loss_curves = path / "loss.png"
        self.held_out = path / "held_out.json"

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)

    def latents(self, autoencoder: Autoencoder) -> Path:
        """The file of latents that this autoencoder has made. The name holds a hash of the tensors that decide them."""
        deciding = ("encoder.", "quant_conv.")
        state = {name: value for name, value in autoencoder.state_dict().items() if name.startswith(deciding)}
        return self.path / f"latents-{tensors_sha256(state)[:16]}.safetensors"

    def remember_start(self, name: str, path: Path) -> None:
        """Write down that the training began with the file `path`, which its recipe calls `name`.

        Raises UserError when it began with another file of this name: parameters that are not trained would come from
        the new file, and trained ones from the old file.
        """
        known, sha256 = read_json(self.starts) if self.starts.is_file() else {}, sha256_file(path)
        if known.setdefault(name, sha256) != sha256:
            raise UserError(f"{self.path} was begun with another {name}; choose another --out, or bring that file back")
        write_json(self.starts, known)
