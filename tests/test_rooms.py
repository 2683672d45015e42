"""The rooms of the source: imports go one way, and some things are done in one place only, or nowhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hydrafs"
ROOMS = [
    "version", "child", "covered", "allocator", "limits", "errors", "path_locks", "sizes",
    "logs", "dtypes", "attributes", "cache", "layout",
    "identity", "filesystem", "openfiles", "leases", "fileattributes",
    "digests", "containers", "assembling", "predictors", "formulas", "codecs", "manifest", "prefetch",
    "diff", "composition", "catalog", "temporary", "root_identity", "marks", "store_lock", "mounttable",
    "submounts", "walk", "store", "suspect", "filecopy", "keptlinks", "journal", "needs", "held", "keeping",
    "renaming",
    "replacing",
    "trash", "basehash", "prediction", "rehydrate", "readahead", "opening", "retained", "fingerprint", "matching",
    "bases",
    "merging", "assigning", "recognising", "loras", "explaining", "plan", "choosing", "encode", "restore",
    "committing", "refusals", "parentage", "dehydrate",
    "collection", "rehome", "asides", "tending", "activity", "policy", "looking", "working", "tried", "survey",
    "turns", "views", "worker", "helper",
    "seed", "recipes", "arithmetic", "computing", "hashing", "coherence", "copy_up", "handles",
    "folder_times", "vfs", "departing", "callers", "file_writes", "writing",
    "libfuse", "callbacks", "fusewriting", "fuse", "mountpoints", "webui", "mountoptions",
    "apparmor", "daemon", "mounting", "service", "anatomy", "changes", "family", "pictures", "report", "api", "cli",
]  # fmt: skip
"""Each imports only from those before it. A new room is put where it belongs, and nowhere else."""

DOORS = {"__init__", "__main__"}
"""What stands in front of the rooms: it may import any of them, and only when it is asked to."""

SOURCES = sorted(p for p in PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in SOURCES}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in it; relative imports keep their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def places(found: list[tuple[Path, int]]) -> list[str]:
    return [f"{path.relative_to(PACKAGE.parent)}:{line}" for path, line in found]


def test_every_room_has_its_place() -> None:
    rooms = {room_of(path) for path in SOURCES} - DOORS
    assert rooms == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room in DOORS:
        return
    allowed = {*ROOMS[: ROOMS.index(room) + 1]}
    for line, name in imports(TREES[path]):
        assert not name.startswith("."), f"{path}:{line}: write imports in full"
        parts = name.split(".")
        if parts[0] == "hydrafs" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in allowed, f"{path}:{line}: {room} imports {parts[1]}, which stands above it"


def test_what_importing_the_package_costs() -> None:
    """The doors import rooms inside functions only, but for the version; help must answer at once."""
    tree = TREES[PACKAGE / "__init__.py"]
    top = {name for node in tree.body for _, name in imports(node) if not isinstance(node, ast.If | ast.FunctionDef)}
    assert {name for name in top if name.startswith("hydrafs")} == {"hydrafs.version.__version__"}


def test_torch_is_imported_in_few_places() -> None:
    """A mount must not pay for it. What needs it is named here, and imports it inside the function that does."""
    allowed = {PACKAGE / "seed" / "checkpoint.py"}
    found = [(p, n) for p, t in TREES.items() for n, name in imports(t) if name.split(".")[0] == "torch"]
    assert not [where for where in found if where[0] not in allowed], places(found)
    for path in allowed:
        top = [name for node in TREES[path].body if isinstance(node, ast.Import) for _, name in imports(node)]
        assert "torch" not in top


def test_nothing_is_unpickled_or_evaluated() -> None:
    """pickletools is a table of opcodes; the others would run what a file says."""
    modules = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    found = [(p, n) for p, t in TREES.items() for n, name in imports(t) if name.split(".")[0] in modules]
    forbidden = ("eval", "exec", "compile", "__import__")
    found += [(p, n) for p, t in TREES.items() for n, name in calls(t) if name in forbidden]
    found += [
        (p, n) for p, t in TREES.items() for n, name in calls(t) if name.endswith(("pickle.load", "pickle.loads"))
    ]
    assert not found, places(found)


def test_only_the_command_line_prints() -> None:
    outputs = ("print", "sys.stdout.write", "sys.stderr.write", "sys.exit", "input")
    found = [(p, n) for p, t in TREES.items() for n, name in calls(t) if name in outputs]
    found = [(p, n) for p, n in found if room_of(p) not in ("cli", "__main__")]
    assert not found, places(found)


ENVIRONMENT = {
    "libfuse.py": "the bindings take the path of libfuse from the environment, and from nowhere else",
    "codecs/rans.py": "which kernel is used, for tests and benchmarks of each",
}


def test_only_the_command_line_reads_the_environment() -> None:
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = ("os.environ", "os.getenv", "os.environb", "sys.argv")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in names and room_of(path) != "cli":
                if str(path.relative_to(PACKAGE)) in ENVIRONMENT:
                    continue
                found.append((path, node.lineno))
    assert not found, places(found)


def test_only_one_room_starts_a_python() -> None:
    """Another way to start one would not find what stands in a folder of its own, such as a package of the system."""
    found = [
        (path, node.lineno)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
    ]
    found = [(path, line) for path, line in found if room_of(path) not in ("child", "__main__")]
    assert not found, places(found)


def test_only_the_adapter_knows_the_binding() -> None:
    found = [
        (path, line)
        for path, tree in TREES.items()
        for line, name in imports(tree)
        if name.split(".")[0] in ("mfusepy", "fuse") and room_of(path) not in ("fuse", "libfuse")
    ]
    assert not found, places(found)


def test_every_module_says_what_it_is() -> None:
    assert not [path for path, tree in TREES.items() if not ast.get_docstring(tree)]
