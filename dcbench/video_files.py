"""Finds the video files of a folder, and names what lies there that is no video which dcbench reads. Without torch."""

import hashlib
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from dcbench.errors import as_text

SUFFIXES = (
    *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".gif"),
    *(".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".vob", ".wmv", ".asf", ".flv", ".ogv", ".3gp", ".apng", ".webp"),
)
# what people keep clips in beside these: raw streams have no frame rate, arrays no colour order
UNREAD = (".264", ".h264", ".265", ".h265", ".hevc", ".m2v", ".yuv", ".y4m", ".rm", ".rmvb", ".avif", ".npy", ".npz")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".exr")
UNSAFE = re.compile(r'[\x00-\x1f\\:*?"<>|\ud800-\udfff]')  # the last: bytes that are not UTF-8


@dataclass(frozen=True)
class Listing:
    """What a folder holds: relative paths, "/" as separator, sorted."""

    videos: tuple[str, ...]
    left_out: tuple[str, ...]  # files of kinds that are not read, and folders of pictures with their number

    def notice(self, root: Path) -> str:
        """A sentence that counts and names what is left out, or ""."""
        if not self.left_out:
            return ""
        shown = ", ".join(self.left_out[:3]) + (" ..." if len(self.left_out) > 3 else "")
        what = "1 entry is" if len(self.left_out) == 1 else f"{len(self.left_out)} entries are"
        return as_text(
            f"{root}: {what} left out, because dcbench does not read them as videos: {shown}. "
            "Make video files of them, for example with ffmpeg"
        )


def find_files(root: Path) -> list[str]:
    """Relative paths of all files, "/" as separator, sorted. Hidden files and folders are left out.

    Symbolic links to folders are followed. A folder that is reached twice counts once.
    """
    found = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def list_videos(root: Path) -> Listing:
    """All videos below a folder, and all that may be meant as one but is not read."""
    videos, left_out, pictures = [], [], dict[str, int]()
    for path in find_files(root):
        suffix = PurePosixPath(path).suffix.lower()
        if suffix in SUFFIXES and (suffix != ".webp" or _moves(root / path)):
            videos.append(path)
        elif suffix in UNREAD:
            left_out.append(path)
        elif suffix in PICTURES:
            folder = path.rpartition("/")[0]
            pictures[folder] = pictures.get(folder, 0) + 1
    with_videos = {path.rpartition("/")[0] for path in videos}  # pictures beside videos are their thumbnails
    folders = {folder: count for folder, count in pictures.items() if folder not in with_videos and count > 1}
    left_out += [f"{folder or '.'}/ (a folder of {count} pictures)" for folder, count in folders.items()]
    return Listing(tuple(videos), tuple(sorted(left_out)))


def make_ids(paths: list[str]) -> dict[str, str]:
    """A unique id for each relative path, safe as a file name: the path without its suffix, "/" replaced by "__".

    An unsafe, too long or repeated name gets a hash of its path, so that no id depends on the order.
    """
    plain = {path: path.rsplit(".", 1)[0].replace("/", "__") for path in paths}
    shared = Counter(name.lower() for name in plain.values())  # some file systems ignore case
    ids = {}
    for path, name in plain.items():
        safe = UNSAFE.sub("_", name).lstrip(".")[:120]
        if safe != name or shared[name.lower()] > 1:
            safe = f"{safe}-{hashlib.blake2b(path.encode('utf-8', 'surrogateescape'), digest_size=4).hexdigest()}"
        ids[path] = safe
    return ids


def find_videos(root: Path) -> list[str]:
    """All videos below a folder. What is left out is said once on stderr."""
    listing = list_videos(root)
    if notice := listing.notice(root):
        _say(notice)
    return list(listing.videos)


@lru_cache(None)
def _say(notice: str) -> None:
    print(notice, file=sys.stderr, flush=True)


def _moves(path: Path) -> bool:
    """Whether a WebP file is an animation; most are pictures. A file that cannot be read is left to its reader."""
    try:
        with path.open("rb") as file:
            header = file.read(21)
    except OSError:
        return True
    return header[8:12] != b"WEBP" or (header[12:16] == b"VP8X" and bool(header[20] & 2))
