"""A training's directory. Only this module knows the names of the files in it.

<out>/<stage>/   state.pt, log.jsonl, weights.safetensors, config.json
<out>/           weights.safetensors, config.json, start.json, loss.png, held_out.json, latents-<hash>.safetensors
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from dcbench.errors import UserError
from dcbench.files import atomic_write, read_json, remove_leftovers, sha256_file, write_json, write_text
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
        """Weights alone do not do: a stage whose config.json is missing or damaged is finished again."""
        return self.weights.is_file() and self._has_config()

    def _has_config(self) -> bool:
        try:
            return isinstance(read_json(self.config), dict)
        except UserError:
            return False

    def mend(self) -> None:
        """Bring the folder into order after a crash, and say what was done. UserError for what cannot be mended."""
        remove_leftovers(self.path)
        if self.weights.is_file() and not self._has_config():
            if not self.state.is_file():
                raise UserError(
                    f"{self.config} is missing or damaged, and {self.state.name} is not there to write it again. Bring "
                    f"the file back, or remove {self.path} to train the stage anew"
                )
            print(f"{self.config} is missing or damaged: the stage is finished again from its state", file=sys.stderr)

    def take(self, source: "StageFolder") -> None:
        """Copy the files of a finished stage, unless this one is finished. Does nothing if `source` is not finished."""
        if self.finished or not source.finished:
            return
        for file in (source.log, source.config, source.weights):  # not the state, which is large and no longer needed
            if file.is_file():
                with atomic_write(self.path / file.name) as temporary:
                    shutil.copyfile(file, temporary)

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of the log, one a step; without what a crash has damaged."""
        by_step: dict[int, dict[str, Any]] = {}
        for text in self.log.read_bytes().splitlines() if self.log.is_file() else ():
            with contextlib.suppress(ValueError):  # UnicodeDecodeError too
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    by_step[line["step"]] = line
        return [by_step[step] for step in sorted(by_step)]

    def add_to_log(self, line: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def trim_log(self, step: int) -> None:
        """Remove the lines after `step`, from which the stage continues: those steps are done again.

        Damaged lines and a second line of a step are removed too, and the number of the damaged ones is told.
        """
        if self.log.is_file():
            written = sum(bool(text.strip()) for text in self.log.read_bytes().splitlines())
            known = self.log_lines()
            if odd := written - len(known):
                print(f"{self.log}: {odd} damaged or doubled lines are removed", file=sys.stderr)
            write_text(self.log, "".join(json.dumps(line) + "\n" for line in known if line["step"] <= step))

    def set_state_aside(self, reason: str) -> None:
        """Rename a state that cannot be read, so that the stage begins anew and nothing is lost."""
        aside = self.state.with_suffix(".damaged")
        print(f"{reason}. It is kept as {aside.name}, and the stage begins anew", file=sys.stderr, flush=True)
        self.state.replace(aside)


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
