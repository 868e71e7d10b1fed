"""The rules of ARCHITECTURE.md: which room imports which, and what each loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "planrt"

FOUNDATION = {
    "lazy",
    "moved",
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
    "metrics",
    "stopping",
}
LAYERS = {
    "lazy": 0, "moved": 0,
    "errors": 0, "version": 0, "tracebacks": 0, "shown": 0, "allocator": 0, "stopping": 0,
    "cards": 1, "exceptions": 1, "extras": 1,
    "types": 1, "seeding": 1, "logs": 1, "metrics": 1, "loop": 1, "chained": 1, "toml_files": 1,
    "serde": 2, "deadlines": 2,
    "command_line": 3, "plans": 3, "sharing": 3, "workers": 4, "protocols": 5, "fl": 5, "vertical": 5, "commands": 5,
    "torch_hook": 6, "sandbox": 7, "grid": 6,
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


ROOMS = (
    "plans.ir", "plans.running", "plans.recording plans.analysis", "plans.forms plans.policy", "plans",
    "workers.wire", "workers.transport workers.machine workers.pointers", "workers.client",
    "workers.serving workers.shares",
    "workers", "fl.data", "fl.runs", "fl",
)  # fmt: skip
"""The rooms of plans, workers and fl, lowest first: a room imports only from itself and from rooms before it. Two that
stand together never meet. Imports inside functions and for types count."""

FOR_TYPES = {
    ("workers.pointers.handle", "workers.base"), ("workers.pointers.plan", "workers.base"),
    ("workers.pointers.tensor", "workers.base"), ("workers.client.registry", "workers.base"),
}  # fmt: skip
"""Types only: `pointer.location` is a `BaseWorker` for who writes ``pointer.location.search(...)``."""

HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms.split()}


def _inner_room(name: str) -> str:
    parts = name.split(".")
    found = ".".join(parts[:2])
    return found if found in HEIGHT else parts[0]


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path):
    """(line, module of planrt, whether at the top of the file)"""
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("planrt."):
            base = node.module.removeprefix("planrt.")
            for alias in node.names:
                inner = PACKAGE.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield node.lineno, f"{base}.{alias.name}" if is_module else base, id(node) not in late


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_from_lower_rooms_only(path):
    me = _module_name(path)
    mine = _inner_room(me)
    if path.name == "__init__.py" or mine not in HEIGHT:
        return
    for line, other, _ in imported_modules(path):
        theirs = _inner_room(other)
        if theirs == mine or theirs not in HEIGHT or (me, other) in FOR_TYPES:
            continue
        assert HEIGHT[theirs] < HEIGHT[mine], f"{me}:{line} imports {other}, which is not below {mine}"


LATE = {
    "cli": "commands that look at a list need no torch",
    "fl.data.digits": "found before torch loads", "fl.mnist_async": "its options are read before torch loads",
    "deadlines": "commands read their options before torch loads",
    "workers.serving.sum_keys": "workers that sign nothing load no signatures",
    "fl.runs.discovery": "options are read before torch loads", "fl.serve": "its options are read before torch loads",
    "fl.runs.status": "a run folder is read without torch",
    "plans.plan": "exports, analysis and files are heavy, and few plans need them",
    "plans.other_sizes": "plans make forms of themselves",
    "plans.policy.rules": "a list of decisions needs no torch",
    "protocols.pointer": "a pointer's protocol comes back as one",
    "serde": "whole objects need the rooms above",
    "workers.serving.isolation.options": "processes are confined on Linux only",
    "workers.pointers.plan_calls": "a call of a plan makes pointers to plans",
    "workers.remote_names": "modules are made on a worker, and a worker has these names",
    "workers.pointers.tensor": "torch asks the class of a pointer, whose ops make pointers",
}  # fmt: skip
"""Modules that import planrt inside functions, and why."""


def test_imports_inside_functions_have_a_reason():
    found = {_module_name(path) for path in modules() if not all(top for _, _, top in imported_modules(path))}
    assert found == set(LATE)


def _planrt_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("core", ["machine.state", "wire.messages", "wire.chain_runs"])
def test_the_machine_is_free_of_loops_sockets_and_clients(core):
    loaded = _planrt_after(f"import planrt.workers.{core}")
    assert not loaded & {
        "websockets",
        "uvloop",
        "planrt.loop",
        "planrt.workers.base",
        "planrt.workers.virtual",
    }
    rooms = tuple(f"planrt.workers.{room}" for room in ("transport", "pointers", "client", "serving"))
    assert not [name for name in loaded if name.startswith(rooms)]


def test_a_clients_session_needs_no_machine():
    loaded = _planrt_after("import planrt.workers.client.session")
    rooms = ("planrt.workers.machine", "planrt.workers.serving", "planrt.workers.transport")
    assert not [name for name in loaded if name.startswith(rooms)]


def test_rooms_are_not_crowded():
    for folder in {path.parent for path in modules()} - {PACKAGE}:
        inside = [one for one in folder.glob("*.py") if one.name != "__init__.py"]
        assert len(inside) <= 22, folder


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


REACH_IN = (
    "workers/client/", "workers/transport/", "workers/base.py", "workers/virtual.py", "workers/websocket_client.py",
    "workers/names_of_02.py", "workers/shares/",
)  # fmt: skip


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_reaches_through_a_worker_to_its_connection(path):
    """`BaseWorker.ask` is the way to ask a worker, and `Workplace` what pointers speak to."""
    if str(path.relative_to(PACKAGE)).startswith(REACH_IN):
        return
    found = [
        f"{path.name}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and (node.attr == "_connection" or ast.unparse(node).endswith("place.connection"))
    ]
    assert not found


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


def test_commands_read_their_options_before_torch_loads():
    assert "torch" not in _modules_after("import planrt.cli, planrt.fl.serve")


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


def test_the_files_that_the_architecture_names_are_there():
    named = set(
        re.findall(r"[`( ]((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)\b", (ROOT / "ARCHITECTURE.md").read_text())
    )
    there = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert len(named) > 80
    assert not [
        name for name in named - {"net.py"} if not any(f"/{path}".endswith(f"/{name}") for path in there)
    ]


CLAUSES = {"What", "Whether", "Where", "How", "Who", "Whose", "Which", "Why", "When"}
"""Words that begin a clause and no sentence: ``What the plan does.``"""

ARTICLES = {"The", "A", "An", "All", "Those", "Every", "Some"}
"""Words that begin the name of a thing. A class or a property is one; a function does something: ``Returns ...``."""


def public_docstrings(path: Path):
    """(line, name, whether a function, first paragraph) of each public class, property, function and method."""

    def inside(node, of):
        for inner in node.body:
            if not isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if inner.name.startswith("_"):
                continue
            name = f"{of}{inner.name}"
            is_class = isinstance(inner, ast.ClassDef)
            if text := ast.get_docstring(inner):
                is_property = any("property" in ast.unparse(one) for one in inner.decorator_list)
                yield inner.lineno, name, not is_class and not is_property, text.split("\n\n")[0]
            if is_class:
                yield from inside(inner, f"{name}.")

    yield from inside(ast.parse(path.read_text()), "")


def badly_begun(is_function: bool, text: str) -> bool:
    first = text.split()[0].strip("`*,;:")
    return first in CLAUSES or (is_function and first in ARTICLES) or text.rstrip()[-1] not in ".:"


NOT_YET = (
    "workers/client/session.py", "workers/serving/guesses.py", "workers/serving/secret_files.py",
    "workers/serving/users_file.py", "workers/transport/tls.py", "workers/wire/channel.py", "workers/wire/proofs.py",
)  # fmt: skip
WRITTEN = [path for path in modules() if not str(path.relative_to(PACKAGE)).startswith(NOT_YET)]
"""Modules whose docstrings begin with sentences: all but these, so far."""


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_docstrings_begin_with_a_sentence(path):
    bad = [
        f"{path.name}:{line} {name}: {text.splitlines()[0]}"
        for line, name, is_function, text in public_docstrings(path)
        if badly_begun(is_function, text)
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("is_function", "text", "bad"),
    [
        (True, "Returns the mean.", False), (True, "Whether it is built.", True), (True, "The mean.", True),
        (False, "The mean.", False), (False, "What a run returns.", True), (True, "Returns the mean", True),
        (True, "Writes a value::", False),
    ],
)  # fmt: skip
def test_a_sentence_is_told_from_a_clause(is_function, text, bad):
    assert badly_begun(is_function, text) is bad
