"""Who may import whom: the layering of the package, file by file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "thresher"

# For each room of the package, the rooms that it may import: arrows point down, and tools do not know each other.
MAY_IMPORT = {
    "__init__": {"budget", "checkpoints", "hosts"},
    "__main__": {"__init__", "console"},
    "signals": set(),
    "console": set(),
    "config": set(),
    "kernels": set(),
    "attention": {"console", "kernels"},
    "feedforward": {"attention"},
    "budget": {"attention"},
    "hosts": {"attention", "console", "feedforward"},
    "models": {"attention", "config", "console", "hosts"},
    "integrations": {"attention", "budget", "hosts"},
    "data": {"attention", "config"},
    "explain": {"attention"},
    "testing": {"attention", "console"},
    "tasks": {"attention", "budget"},
    "checkpoints": {"attention"},
    "callbacks": {"attention", "budget", "checkpoints", "console", "signals", "tasks"},
    "results": {"config"},
    "run": {
        *("attention", "budget", "callbacks", "checkpoints", "config", "data", "explain", "hosts", "signals", "tasks"),
    },
    "cli": {"checkpoints", "config", "console", "run", "signals"},
    "tools.bench": {
        "attention",
        "budget",
        "checkpoints",
        "cli",
        "config",
        "console",
        "hosts",
        "models",
        "run",
        "testing",
    },
    "tools.doctor": {
        "attention",
        "budget",
        "checkpoints",
        "cli",
        "config",
        "console",
        "hosts",
        "kernels",
        "models",
        "testing",
    },
    "tools.export": {"attention", "checkpoints", "config", "console", "hosts", "results"},
    "tools.hosts": {"attention", "checkpoints", "cli", "config", "console", "hosts", "models"},
    "tools.report": {"config", "console", "results"},
    "tools.sweep": {"cli", "config", "console", "results"},
    **{name: set() for name in ("bench", "doctor", "export", "report", "sweep", "tools")},  # for `python -m` only
}
# Libraries that only these parts may import, so that the rest stays light or free of them.
ONLY_IN = {
    "timm": {
        "tools/bench/plain.py",
        "tools/doctor/subjects.py",
        "tools/hosts/networks.py",
        "hosts/timm.py",
        "hosts/__main__.py",
        "models/build.py",
    },
    "transformers": {
        *("tools/bench/peers.py", "tools/bench/plain.py", "data/tokens.py"),
        *(
            "hosts/huggingface/host.py",
            "hosts/huggingface/cache.py",
            "hosts/huggingface/saving.py",
            "hosts/huggingface/switch.py",
            "hosts/__main__.py",
        ),
        *("models/huggingface.py", "integrations/transformers.py"),
    },
    "peft": {"hosts/peft.py"},
    "datasets": {"data/hub.py"},
    "hydra": {"config/overrides.py", "cli/main.py", "run/build.py", "run/early.py", "checkpoints/rebuild.py"},
    "pytorch_lightning": {
        *("tasks", "callbacks", "data", "run", "tools/bench/overhead.py", "checkpoints/resume.py"),
    },
    "reformer_pytorch": {"tools/bench/peers.py"},
    "performer_pytorch": {"tools/bench/peers.py"},
    "nystrom_attention": {"tools/bench/peers.py"},
    "x_transformers": {"tools/bench/peers.py"},
    "wandb": {"callbacks/heads.py", "run/loggers.py"},
    "plotly": {"tools/bench/plot.py", "tools/report/page.py"},
    "jinja2": {"tools/report/page.py"},
    "markupsafe": {"tools/report/page.py"},
    "optuna": {"tools/sweep"},
    "onnxruntime": {"tools/export/programs.py"},
    "onnxscript": {"tools/export/programs.py"},
    "ray": {"tools/sweep/launchers.py"},
    "submitit": {"tools/sweep/launchers.py"},
    "triton": {"kernels/triton"},
}


def room_of(module: str) -> str:
    """Return the room of a module, given by its name inside of the package."""
    first, _, rest = module.partition(".")
    return f"tools.{rest.partition('.')[0]}" if first == "tools" and rest.partition(".")[0] else first or "__init__"


def name_of(path: Path) -> str:
    """Return the name of a module inside of the package; that of a folder is the name of its `__init__`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imported(path: Path, *, only_at_once: bool = False) -> set[str]:
    """Return the modules that a file imports; at once: while it is itself imported, so not inside of functions."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    nodes = _at_once(tree) if only_at_once else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if is_module(inner) else node.module)
    return found


def _at_once(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from _at_once(child)


def is_module(name: str) -> bool:
    if not name.startswith("thresher."):
        return False
    place = SOURCE.joinpath(*name.split(".")[1:])
    return place.is_dir() or place.with_suffix(".py").is_file()


def violations(path: Path) -> list[str]:
    found = []
    room = room_of(name_of(path))
    where = path.relative_to(SOURCE).as_posix()
    for module in imported(path):
        top, _, rest = module.partition(".")
        if top == "thresher" and room_of(rest) not in MAY_IMPORT[room] | {room}:
            found.append(f"{where} imports {module}")
        if top in ONLY_IN and not any(where == place or where.startswith(f"{place}/") for place in ONLY_IN[top]):
            found.append(f"{where} imports {top}")
    return found


def circles() -> list[list[str]]:
    """Return the import circles between modules, imports for the type checker included."""
    graph = {}
    for path in modules():
        names = {module.removeprefix("thresher.") for module in imported(path, only_at_once=True) if is_module(module)}
        graph[name_of(path)] = names - {name_of(path)}
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: name_of(path) or "thresher")
def test_imports_follow_the_layers(path: Path) -> None:
    assert violations(path) == []


def test_layers_have_no_circle() -> None:
    """Arrows between rooms point down."""
    below: set[str] = set()
    left = dict(MAY_IMPORT)
    while free := [room for room, others in left.items() if others <= below]:
        below.update(free)
        for room in free:
            del left[room]
    assert not left


def test_modules_import_each_other_in_no_circle() -> None:
    assert circles() == []


def test_few_modules_stand_outside_of_rooms() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= 4


def test_a_forbidden_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attention").mkdir()
    bad = tmp_path / "attention" / "bad.py"
    bad.write_text("from thresher.hosts.core import mount\nimport timm.layers\nfrom thresher import tasks\n")
    (tmp_path / "hosts").mkdir()
    (tmp_path / "tasks").mkdir()
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    assert len(violations(bad)) == 3


def test_files_stay_short() -> None:
    long = {path.name: n for path in modules() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


# Rooms in which objects get everything when they are built, and what they may set nevertheless.
BUILT_WHOLE = ("run", "checkpoints", "cli", "config", "callbacks", "tasks", "explain")
MAY_SET = {
    ("run/spawned.py", "strategy._launcher"),  # Lightning builds it, and takes no other
    ("run/spawned.py", "signum.value"),  # a number shared by processes
    ("run/build.py", "torch._functorch.config.donated_buffer"),
    ("run/dropin/run.py", "config.dropin"),  # parts of a config that was composed or copied there
    ("run/dropin/run.py", "config.run.name"),
    ("run/dropin/run.py", "replaced.attention"),
    ("callbacks/snapshots.py", "loop._batches_that_stepped"),  # Lightning's, which counts a step too many
    ("tasks/sharding.py", "parameter.grad"),
}


def set_attributes(path: Path) -> set[str]:
    """Return the attributes of other objects than `self` and its own helpers that a file sets."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign | ast.For):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                if isinstance(each, ast.Attribute):
                    name = ast.unparse(each)
                    own = name.startswith("self.") and (name.count(".") == 1 or name.startswith("self._"))
                    if not own:
                        found.add(name)
    return found


@pytest.mark.parametrize("room", BUILT_WHOLE)
def test_nothing_sets_attributes_of_another_object(room: str) -> None:
    found = {
        (path.relative_to(SOURCE).as_posix(), name)
        for path in (SOURCE / room).rglob("*.py")
        for name in set_attributes(path)
    }
    assert found <= MAY_SET
    assert {entry for entry in MAY_SET if entry[0].partition("/")[0] == room} <= found, (
        "an exception that is not needed"
    )
