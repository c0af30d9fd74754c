"""Motions of a camera, and the words in which VBench's prompts ask for them (arXiv 2411.13503)."""

import re

CLASSES = ("pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "static")
PHRASES = {  # how VBench's prompts end
    "camera pans left": "pan_left",
    "camera pans right": "pan_right",
    "camera tilts up": "tilt_up",
    "camera tilts down": "tilt_down",
    "camera zooms in": "zoom_in",
    "camera zooms out": "zoom_out",
    "camera static": "static",
}


def asked_class(prompt: str | None) -> str | None:
    """The class that a prompt asks for in VBench's words, in small or capital letters. Of several, the last one."""
    found = re.findall("|".join(PHRASES), " ".join((prompt or "").lower().split()))
    return PHRASES[found[-1]] if found else None
