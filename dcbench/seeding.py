"""One seed and one CPU generator for each clip. They do not depend on its batch, rank or device."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def clip_seed(run_seed: int, clip_id: str) -> int:
    """The seed of a clip: 63 bits of a hash of the run's seed and the clip's id."""
    digest = hashlib.blake2b(f"{run_seed}/{clip_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, stream: str = "") -> "torch.Generator":
    """A CPU generator. Noise is drawn on the CPU and moved, so that it is the same on every device.

    `stream` separates independent uses of one seed (for example "latents" and "posterior").
    """
    import torch  # imported here, because planning a run does not need it

    return torch.Generator("cpu").manual_seed(clip_seed(seed, stream) if stream else seed)
