"""Imports go one way: cli -> run and analysis -> models | datasets | metrics -> video ... -> catalogue, record."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dcbench"

LEVELS = {
    "errors": 0, "version": 0, "escape": 0, "facts": 2, "files": 1, "shapes": 5,
    "catalogue": 3, "record": 3, "progress": 1, "seeding": 1,
    "clips": 4, "trust": 4, "weights": 5, "machine": 4, "totals": 3.5, "protocol": 4, "pictures": 4,
    "programs": 4, "supervisor": 0, "video_files": 4, "video_worker": 4, "video_processes": 4, "video": 5, "takes": 5.5,
    "models": 6, "datasets": 6, "metrics": 6,
    "members": 2, "camera": 0, "ranks": 7, "runs": 9, "animate": 8, "training": 8, "reports": 11,
    "analysis": 12, "api": 13, "cli": 13, "__main__": 14, "__init__": 14,
}  # fmt: skip
SIDE_BY_SIDE = {"models", "datasets", "metrics"}
NO_TORCH = (
    "errors",
    "catalogue",
    "record",
    "facts",
    "files",
    "runs/directory",
    "runs/status",
    "runs/storage",
    "runs/transfer",
    "progress",
    "protocol",
    "totals",
    "cli/app",
    "cli/evaluate",
    "cli/options",
    "cli/storage",
    "cli/tools",
)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> list[str]:
    """The modules that a file names in any import statement, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "dcbench"
            found += [f"dcbench.{alias.name}" for alias in node.names] if whole else [node.module]
    return found


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        mine = room(".".join(["dcbench", *path.relative_to(PACKAGE).with_suffix("").parts]))
        for module in imports(path):
            if module.split(".")[0] != "dcbench" or module == "dcbench":
                continue
            theirs = room(module)
            sideways = {mine, theirs} <= SIDE_BY_SIDE and mine != theirs
            if theirs not in LEVELS and not hasattr(__import__("dcbench"), theirs):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}, which this test does not know")
            elif sideways or (mine != theirs and LEVELS[mine] <= LEVELS.get(theirs, 0)):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_level():
    rooms = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(LEVELS)


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_rooms_import_nothing_heavy_at_their_top(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    top = {
        module.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not top & {"torch", "pandas", "matplotlib", "scipy", "numpy"}


def test_cards_are_no_code():
    assert not [path for folder in ("models", "datasets") for path in (ROOT / folder).rglob("*.py")]


def test_no_file_is_a_corridor():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path): lines for path, lines in lengths.items() if lines > 550}
