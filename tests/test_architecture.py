"""The import rule of ARCHITECTURE.md: later rooms may import earlier ones, never the other way round."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "planrt"

FOUNDATION = {
    "cards",
    "errors",
    "exceptions",
    "extras",
    "types",
    "version",
    "seeding",
    "logs",
    "tracebacks",
    "shown",
    "allocator",
}
LAYERS = {
    "errors": 0, "version": 0, "tracebacks": 0, "shown": 0, "allocator": 0, "cards": 1, "exceptions": 1, "extras": 1,
    "types": 1, "seeding": 1, "logs": 1, "loop": 1, "command_line": 1,
    "serde": 2,
    "plans": 3, "tensors": 3, "workers": 4, "protocols": 5, "fl": 5, "torch_hook": 6, "sandbox": 7, "grid": 6,
    "cli": 6, "placing": 7, "__main__": 7, "compat_names": 7, "compat": 8,
}  # fmt: skip
"""Room -> layer. A room imports its own modules and those of lower layers; two rooms of a layer never meet."""


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write absolute imports"
            names = [node.module or ""]
        for name in names:
            if name == "planrt":
                yield node.lineno, "the root"
            elif name.startswith("planrt."):
                yield node.lineno, name.split(".")[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return  # the root gathers public names from everywhere
    assert room in LAYERS, f"{path.name}: a new room needs a layer here and in ARCHITECTURE.md"
    for line, other in imported_rooms(path):
        allowed = other == room or (other in LAYERS and LAYERS[other] < LAYERS[room])
        allowed = allowed or (room in FOUNDATION and other in FOUNDATION)
        assert allowed, f"{path.relative_to(PACKAGE)}:{line} imports {other}, which is not below {room}"


FORBIDDEN = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "importlib.util"
}  # fmt: skip


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_executes_what_a_peer_sent(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & FORBIDDEN, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            bad = called in {"eval", "exec", "compile", "__import__"} or called.endswith(
                ("torch.load", "jit.load", "export.load")
            )
            assert not bad, f"{path.name}:{node.lineno} calls {called}"


def test_torch_jit_lives_in_one_module():
    users = {
        path.name for path in modules() if "torch.jit." in _code_of(path) or "torch._C._jit" in _code_of(path)
    }
    assert users <= {"torchscript.py"}


def _code_of(path: Path) -> str:
    tree = ast.parse(path.read_text())
    return "\n".join(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def _modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_planrt_is_light():
    assert "torch" not in _modules_after("import planrt")


def test_the_public_names_need_nothing_heavy_beyond_torch():
    loaded = _modules_after("import planrt; [getattr(planrt, name) for name in planrt.__all__]")
    assert "torch" in loaded
    assert not loaded & {"torchvision", "sklearn", "matplotlib", "scipy", "pandas", "PIL"}


def test_planrt_knows_its_own_files_from_a_users():
    from planrt import errors
    from planrt.plans.ir.source import is_users

    assert not any(is_users(str(path)) for path in modules())
    assert not is_users(errors.__file__)
    assert is_users(__file__)
