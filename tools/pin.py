"""Write the resolved versions of all dependencies into pyproject.toml's `constraint-dependencies`.

`uv.lock` contains the URL of a registry, so it is not committed. This list has the same versions without the URL.
Run after `uv lock --upgrade`:  uv run python tools/pin.py
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    versions: dict[str, list[tuple[str, list[str]]]] = {}
    for package in lock["package"]:
        if "version" in package and "registry" in package.get("source", {}):
            marker = package.get("resolution-markers", [])
            versions.setdefault(package["name"], []).append((package["version"], marker))
    lines = []
    for name, found in sorted(versions.items()):
        for version, markers in sorted(found):
            condition = " or ".join(f"({marker})" for marker in markers) if len(found) > 1 else ""
            lines.append(f'    "{name}=={version}{f" ; {condition}" if condition else ""}",')
    block = "constraint-dependencies = [\n" + "\n".join(lines) + "\n]\n"
    path = ROOT / "pyproject.toml"
    text = re.sub(r"constraint-dependencies = \[\n.*?\n\]\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    path.write_text(text.replace("[tool.uv]\n", "[tool.uv]\n" + block, 1), encoding="utf-8")
    print(f"{len(lines)} pins written to {path.name}")


if __name__ == "__main__":
    main()
