"""The wheel works outside the checkout: cards, protocols and the command come along."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from dcbench.machine import namesake

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uv = shutil.which("uv")
    assert uv, "uv builds the wheel: pip install uv"
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "dcbench"
    # a copy, because a folder `build` of an earlier day still holds files that were moved since
    left_out = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "data", "reports", "tests", "*.egg-info", "__pycache__"
    )
    shutil.copytree(
        ROOT, source, ignore=lambda folder, names: left_out(folder, names) if Path(folder) == ROOT else set()
    )
    done = subprocess.run([uv, "build", "--wheel", "--out-dir", str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_one_package_with_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dcbench"}
    for kind in ("models", "datasets"):
        cards = {path.name for path in (ROOT / kind).glob("*.toml")}
        assert {Path(name).name for name in names if f"_catalogue/{kind}/" in name} == cards
    packaged = {name for name in names if name.endswith(".py")}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "dcbench").rglob("*.py")}
    assert packaged == here


def test_the_installed_wheel_lists_models_outside_the_checkout(wheel, tmp_path):
    """A clean environment that shares this one's dependencies (they are gigabytes) but not the checkout."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    # a .pth file would run the checkout's editable finder: take the packages only, by path
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHOME"}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), dependencies])
    program = "import dcbench, sys; print(dcbench.__file__); from dcbench.cli import main; main()"
    done = subprocess.run(
        [str(home / "bin" / "python"), "-c", program, "list", "models"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "dynamicrafter" in done.stdout
    for kind in ("datasets", "metrics", "protocols"):
        again = subprocess.run(
            [str(home / "bin" / "python"), "-c", "from dcbench.cli import main; main()", "list", kind],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert again.returncode == 0, again.stderr
        assert again.stdout.strip()


def test_the_package_has_a_name_of_its_own_and_the_other_project_is_noticed(tmp_path, monkeypatch):
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert facts["name"] == "dcbench-i2v"  # "dcbench" on PyPI is a project about data-centric AI
    assert list(facts["scripts"]) == ["dcbench"]
    monkeypatch.syspath_prepend(str(tmp_path))
    for version, summary, found in (("0.0.4", "Data-centric AI", "0.0.4"), ("0.1.0", facts["description"], "")):
        info = tmp_path / "dcbench.dist-info"
        info.mkdir(exist_ok=True)
        lines = ["Metadata-Version: 2.1", "Name: dcbench", f"Version: {version}", f"Summary: {summary}", ""]
        (info / "METADATA").write_text("\n".join(lines))
        assert namesake() == found
