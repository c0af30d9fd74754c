"""`uv run` installs decord once: its wheel has the same tag in its name and inside (tools/decord)."""

import base64
import csv
import hashlib
import importlib.util
import io
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed on this platform")
def test_the_wheel_is_that_of_pypi_with_the_tag_of_its_name(tmp_path):
    spec = importlib.util.spec_from_file_location("repack", ROOT / "tools" / "decord" / "repack.py")
    assert spec and spec.loader
    repack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(repack)
    name = repack.build_wheel(str(tmp_path))
    wheel = zipfile.ZipFile(tmp_path / name)
    info = "decord-0.6.0.dist-info"
    tags = [line for line in wheel.read(f"{info}/WHEEL").decode().splitlines() if line.startswith("Tag: ")]
    assert tags == [f"Tag: {name.removeprefix('decord-0.6.0-').removesuffix('.whl')}"] and "py3-none-" in name
    rows = list(csv.reader(io.StringIO(wheel.read(f"{info}/RECORD").decode())))
    assert sorted(row[0] for row in rows) == sorted(wheel.namelist())
    for file, digest, size in rows:
        content = wheel.read(file)
        if digest:
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={found}", len(content)), file
        if not file.startswith(info):
            assert content == Path(str(distribution("decord").locate_file(file))).read_bytes()
    assert {"decord/__init__.py", f"{info}/METADATA"} <= set(wheel.namelist())


def test_uv_takes_decord_from_there():
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert facts["tool"]["uv"]["sources"]["decord"] == {"path": "tools/decord"}
    mended = tomllib.loads((ROOT / "tools" / "decord" / "pyproject.toml").read_text(encoding="utf-8"))
    assert mended["build-system"]["requires"] == [f"decord=={mended['project']['version']}"]
