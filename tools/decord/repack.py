"""A build backend: the files of the installed decord as a wheel whose tag inside is that of its name."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import re
import sysconfig
import zipfile
from pathlib import Path

OF_INSTALLERS = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json"}


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    found = importlib.metadata.distribution("decord")
    tag = f"py3-none-{re.sub(r'[-.]', '_', sysconfig.get_platform())}"
    info = f"decord-{found.version}.dist-info"
    record = io.StringIO()
    lines = csv.writer(record, lineterminator="\n")
    name = f"decord-{found.version}-{tag}.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:  # not compressed: uv unpacks it at once
        for file in sorted(found.files or (), key=str):
            is_own = file.parts[0] in ("decord", "decord.libs", info) and file.suffix != ".pyc"
            if not is_own or (file.parts[0] == info and file.name in OF_INSTALLERS):
                continue
            content = Path(str(file.locate())).read_bytes()
            if file.name == "WHEEL" and file.parts[0] == info:
                content = re.sub(rb"(?m)^Tag: .*$", f"Tag: {tag}".encode(), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            wheel.writestr(zipfile.ZipInfo(file.as_posix()), content)
            lines.writerow([file.as_posix(), f"sha256={digest}", len(content)])
        lines.writerow([f"{info}/RECORD", "", ""])
        wheel.writestr(zipfile.ZipInfo(f"{info}/RECORD"), record.getvalue())
    return name
