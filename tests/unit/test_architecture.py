"""The rooms and who may import whom (CONTRIBUTING.md, "Rooms"), read from the syntax trees, nothing executed.

Rules:
- The table below is the architecture: a module imports from its own room and from lower levels, never upwards and
  never from another room of its own level.
- Every rule is tried twice: the repository keeps it, and a small tree that breaks it is caught.
- An import under `if TYPE_CHECKING` counts like any other: a name one depends on is a dependency.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

LEVELS = (
    ("cli",),
    ("commands",),
    ("app", "supervisor", "embedded", "admin"),
    ("guard",),
    ("detect", "policy", "identity", "limits", "engine", "telemetry", "report", "lab", "capacity", "starter"),
    ("store",),
    ("config", "domain", "errors"),
    ("audit",),
    ("trust",),
)
HEIGHT = {room: -depth for depth, rooms in enumerate(LEVELS) for room in rooms}
PACKAGES = ("gateway", "offline_bundle")
BUNDLE_MAY_IMPORT = "trust"  # of gateway, this room only
MAY_DEFER = ("cli", "commands", "embedded")
MAY_IMPORT_VLLM = ("embedded",)
MAY_IMPORT_BUNDLE = ("cli", "commands")
NO_WEB = ("audit", "trust")
WEB = ("fastapi", "starlette", "uvicorn", "sqlalchemy")
TRUST_LIBRARIES = ("cryptography",)
FILE_LINES = 500
FUNCTION_LINES = 60


@dataclass(frozen=True)
class Import:
    """One imported module, and where it stands."""

    target: str
    line: int
    deferred: bool


@dataclass(frozen=True)
class Module:
    """One source file of a package."""

    name: str
    path: Path
    text: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def room(self) -> str:
        """The part of `gateway` that this belongs to; empty for `gateway/__init__.py`."""
        return room_of(self.name)

    def at(self, line: int) -> str:
        return f"{self.path.as_posix()}:{line}"


Modules = dict[str, Module]
Rule = Callable[[Modules], Iterator[str]]


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def read_modules(root: Path) -> Modules:
    """Every Python file of the two packages under `root`, by module name."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    modules = {}
    for name, path in names.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        base = name if path.stem == "__init__" else name.rpartition(".")[0]
        found = tuple(find_imports(tree, base, set(names)))
        modules[name] = Module(name, path.relative_to(root), text, tree, found)
    return modules


def find_imports(tree: ast.AST, base: str, known: set[str], deferred: bool = False) -> Iterator[Import]:
    """The imports of a tree; `base` is the package that relative ones start from."""
    for node in ast.iter_child_nodes(tree):
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield Import(whole if whole in known else source, node.lineno, deferred)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield Import(ast.unparse(node), node.lineno, True)
        yield from find_imports(node, base, known, inside)


def top(target: str) -> str:
    return target.partition(".")[0]


def known_rooms(modules: Modules) -> Iterator[str]:
    """Every room has a level."""
    for module in modules.values():
        if module.package == "gateway" and module.room and module.room not in HEIGHT:
            yield f"{module.path}: the room '{module.room}' has no level in LEVELS"


def downward(modules: Modules) -> Iterator[str]:
    """Imports point down; rooms of one level do not know each other."""
    for module in modules.values():
        for found in module.imports:
            room = room_of(found.target)
            if module.package != "gateway" or top(found.target) != "gateway" or not room or room == module.room:
                continue
            if not module.room or HEIGHT.get(room, 0) >= HEIGHT.get(module.room, 0):
                yield f"{module.at(found.line)}: '{module.room or 'gateway'}' imports '{room}', which is not below it"


def bundle_stands_alone(modules: Modules) -> Iterator[str]:
    """`offline_bundle` imports only `gateway.trust`, and only the composition root imports `offline_bundle`."""
    for module in modules.values():
        for found in module.imports:
            outside = module.package == "offline_bundle" and top(found.target) == "gateway"
            if outside and room_of(found.target) != BUNDLE_MAY_IMPORT:
                yield f"{module.at(found.line)}: offline_bundle imports {found.target}"
            inside = module.package == "gateway" and top(found.target) == "offline_bundle"
            if inside and module.room not in MAY_IMPORT_BUNDLE:
                yield f"{module.at(found.line)}: '{module.room}' imports offline_bundle"


def no_cycle(modules: Modules) -> Iterator[str]:
    """No module reaches itself by imports."""
    graph = {name: {found.target for found in module.imports} & set(modules) for name, module in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> Iterator[str]:
        if name in trail:
            yield "import cycle: " + " → ".join((*trail[trail.index(name) :], name))
        elif name not in done:
            for target in sorted(graph[name]):
                yield from visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        yield from visit(name, ())


def no_deferred_import(modules: Modules) -> Iterator[str]:
    """Imports stand at the top of the file, so that the table above is the whole truth."""
    for module in modules.values():
        for found in module.imports:
            if found.deferred and not (module.package == "gateway" and module.room in MAY_DEFER):
                yield f"{module.at(found.line)}: deferred import of {found.target}"


def vllm_only_embedded(modules: Modules) -> Iterator[str]:
    """The gateway speaks to vLLM over a socket; only the embedded guard lives in its process."""
    for module in modules.values():
        for found in module.imports:
            if top(found.target) == "vllm" and not (module.package == "gateway" and module.room in MAY_IMPORT_VLLM):
                yield f"{module.at(found.line)}: imports {found.target}"


def no_web_below(modules: Modules) -> Iterator[str]:
    """The audit log and the bundler never load a web framework or the store's."""
    for module in modules.values():
        guarded = module.package == "offline_bundle" or module.room in NO_WEB
        for found in module.imports:
            if guarded and top(found.target) in WEB:
                yield f"{module.at(found.line)}: imports {found.target}"


def trust_is_small(modules: Modules) -> Iterator[str]:
    """Trust is the standard library and `cryptography`."""
    allowed = {*sys.stdlib_module_names, *TRUST_LIBRARIES, "gateway"}
    for module in modules.values():
        for found in module.imports:
            if module.room == "trust" and module.package == "gateway" and top(found.target) not in allowed:
                yield f"{module.at(found.line)}: imports {found.target}"


def short_files(modules: Modules) -> Iterator[str]:
    """A file is at most FILE_LINES long."""
    for module in modules.values():
        length = len(module.text.splitlines())
        if length > FILE_LINES:
            yield f"{module.path}: {length} lines"


def short_functions(modules: Modules) -> Iterator[str]:
    """A function is at most FUNCTION_LINES long, signature and docstring included."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{module.at(node.lineno)}: {node.name} has {length} lines"


# Each rule, and the smallest trees that break it.
BREACHES: tuple[tuple[Rule, dict[str, str]], ...] = (
    (known_rooms, {"gateway/attic.py": ""}),
    (known_rooms, {"gateway/attic/box.py": ""}),
    (downward, {"gateway/trust/keys.py": "import gateway.audit", "gateway/audit/__init__.py": ""}),
    (downward, {"gateway/guard/front.py": "from gateway import app", "gateway/app.py": ""}),
    (downward, {"gateway/limits/queue.py": "from gateway.engine.client import Client", "gateway/engine/client.py": ""}),
    (downward, {"gateway/limits/queue.py": "from ..engine import client", "gateway/engine/client.py": ""}),
    (downward, {"gateway/domain.py": "from gateway.errors import E", "gateway/errors.py": ""}),
    (downward, {"gateway/app.py": "def f():\n    import gateway.cli", "gateway/cli.py": ""}),
    (downward, {"gateway/__init__.py": "from gateway.trust import keys", "gateway/trust/keys.py": ""}),
    (
        downward,
        {"gateway/audit/log.py": "if TYPE_CHECKING:\n    from gateway.store import db", "gateway/store/db.py": ""},
    ),
    (
        bundle_stands_alone,
        {"offline_bundle/build.py": "from gateway.audit import merkle", "gateway/audit/merkle.py": ""},
    ),
    (bundle_stands_alone, {"offline_bundle/build.py": "import gateway"}),
    (bundle_stands_alone, {"gateway/app.py": "import offline_bundle", "offline_bundle/__init__.py": ""}),
    (
        no_cycle,
        {
            "gateway/engine/a.py": "import gateway.engine.b",
            "gateway/engine/b.py": "from gateway.engine.c import x",
            "gateway/engine/c.py": "from gateway.engine import a",
        },
    ),
    (no_deferred_import, {"gateway/app.py": "def f():\n    import json"}),
    (no_deferred_import, {"gateway/app.py": "class A:\n    async def f(self):\n        from json import loads"}),
    (no_deferred_import, {"gateway/app.py": "import importlib\nx = importlib.import_module('json')"}),
    (no_deferred_import, {"offline_bundle/build.py": "def commands():\n    import json"}),
    (vllm_only_embedded, {"gateway/engine/launch.py": "from vllm.entrypoints import openai"}),
    (no_web_below, {"gateway/audit/writer.py": "import starlette.requests"}),
    (no_web_below, {"offline_bundle/build.py": "from sqlalchemy import select"}),
    (trust_is_small, {"gateway/trust/keys.py": "import msgspec"}),
    (short_files, {"gateway/app.py": "x = 1\n" * (FILE_LINES + 1)}),
    (short_functions, {"gateway/app.py": "def f():\n" + "    x = 1\n" * FUNCTION_LINES}),
)
RULES = list(dict.fromkeys(rule for rule, _ in BREACHES))
WITHIN: dict[str, str] = {
    "gateway/__init__.py": "__version__ = '1'",
    "gateway/cli.py": "from gateway import __version__\nfrom gateway.commands import up",
    "gateway/commands/up.py": "def f():\n    from gateway import app\n    import offline_bundle.build",
    "gateway/app.py": "from gateway.guard import front\nfrom gateway.trust.keys import Key\nimport fastapi",
    "gateway/embedded.py": "import vllm\ndef f():\n    from vllm import engine",
    "gateway/guard/front.py": "import gateway.engine.client\nfrom . import body",
    "gateway/guard/body.py": "import importlib.metadata",
    "gateway/engine/client.py": "from gateway.errors import E",
    "gateway/errors.py": "x = 1\n" * FILE_LINES,
    "gateway/trust/keys.py": "import cryptography\ndef f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1),
    "offline_bundle/build.py": "from gateway.trust import keys",
}


def plant(root: Path, files: dict[str, str]) -> Modules:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_modules(root)


@cache
def repository() -> Modules:
    return read_modules(REPOSITORY)


def every_module(package: str) -> list[str]:
    return [name for name in repository() if name == package or name.startswith(f"{package}.")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule) -> None:
    assert list(rule(repository())) == []


@pytest.mark.parametrize(
    ("rule", "files"), BREACHES, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(BREACHES)]
)
def test_a_breach_is_found(rule: Rule, files: dict[str, str], tmp_path: Path) -> None:
    assert list(rule(plant(tmp_path, files))) != []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_is_allowed_is_not_reported(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(plant(tmp_path, WITHIN))) == []


def test_the_tree_was_read() -> None:
    modules = repository()
    assert {"gateway", "gateway.cli", "offline_bundle"} <= set(modules)
    assert any(found.target.startswith("gateway.") for found in modules["gateway.cli"].imports)


@pytest.mark.parametrize("package", ["gateway.trust", "gateway.audit", "offline_bundle"])
def test_importing_it_loads_no_web_framework(package: str) -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {every_module(package)!r}: importlib.import_module(name)\n"
        f"print(sorted(set({WEB!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
