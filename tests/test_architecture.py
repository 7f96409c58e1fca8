"""Who may import whom: the layering of the package, file by file."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "thresher"

# For each part of the package, the other parts that it may import. A file belongs to the longest name that fits.
MAY_IMPORT = {
    "__init__": {"calibration", "compute", "hosts", "loading"},
    "attention": {"kernels"},
    "kernels": set(),
    "hosts": {"attention"},
    "models": {"attention", "hosts", "installed"},
    "compute": {"attention"},
    "budgets": {"attention", "compute"},
    "calibration": {"attention"},
    "explain": {"attention"},
    "data": {"attention", "installed"},
    "installed": set(),
    "tasks": {"attention", "budgets", "calibration", "compute"},
    "callbacks": {"attention", "calibration", "clock", "compute", "files", "interruption", "tasks"},
    "trainers": {"attention", "tasks"},
    "loggers": {"attention"},
    "overrides": set(),
    "clock": set(),
    "pareto": set(),
    "files": set(),
    "interruption": set(),
    "secrets": set(),
    "trust": set(),
    "exported": {"__init__", "trust"},
    "checkpoint": {"attention", "exported", "files", "trust"},
    "saving": {"checkpoint", "files"},
    "loading": {"checkpoint", "exported", "trust"},
    "export": {"attention", "checkpoint", "exported", "loading", "report", "secrets", "trust"},
    "results": {"attention", "files"},
    "resuming": {"checkpoint", "files"},
    "sweep": {"clock", "commands", "overrides", "pareto"},
    "report": {"overrides", "pareto", "sweep"},
    "bench": {
        *("attention", "calibration", "checkpoint", "cli", "commands", "compute", "hosts", "models", "overrides"),
    },
    "doctor": {
        *("attention", "commands", "compute", "exported", "hosts", "kernels", "loading", "models", "overrides"),
    },
    "commands": {"cli", "dropin", "files", "interruption", "overrides", "secrets"},
    "dropin": {
        *("attention", "calibration", "callbacks", "checkpoint", "cli", "compute", "data", "hosts", "overrides"),
        *("results", "trainers"),
    },
    "cli": {
        *("__init__", "attention", "callbacks", "checkpoint", "explain", "interruption", "loggers", "overrides"),
        *("results", "resuming", "saving", "secrets", "tasks", "trainers", "trust"),
    },
}
# Libraries that only these parts may import, so that the rest stays light or free of them.
ONLY_IN = {
    "timm": {"bench/plain.py", "doctor/subjects.py", "hosts/timm.py", "hosts/__main__.py", "models/build.py"},
    "transformers": {
        *("bench/peers.py", "bench/plain.py", "data/tokens.py"),
        *("hosts/huggingface.py", "hosts/huggingface_cache.py", "hosts/huggingface_switch.py", "hosts/__main__.py"),
        "models/huggingface.py",
    },
    "datasets": {"data/hub.py"},
    "hydra": {"overrides.py", "commands.py", "cli.py", "resuming.py"},
    "pytorch_lightning": {
        *("tasks", "callbacks", "data", "bench/overhead.py", "dropin/run.py"),
        *("cli.py", "loggers.py", "resuming.py", "trainers.py"),
    },
    "reformer_pytorch": {"bench/peers.py"},
    "performer_pytorch": {"bench/peers.py"},
    "nystrom_attention": {"bench/peers.py"},
    "x_transformers": {"bench/peers.py"},
    "wandb": {"callbacks/heads.py", "loggers.py"},
    "plotly": {"bench/plot.py", "report/page.py"},
    "jinja2": {"report/page.py"},
    "markupsafe": {"report/page.py"},
    "optuna": {"sweep"},
    "onnxruntime": {"export/programs.py"},
    "onnxscript": {"export/programs.py"},
    "ray": {"sweep/launchers.py"},
    "submitit": {"sweep/launchers.py"},
}


def parts() -> list[tuple[Path, str]]:
    return [(path, path.relative_to(SOURCE).parts[0].removesuffix(".py")) for path in sorted(SOURCE.rglob("*.py"))]


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= named if node.module == "thresher" else {node.module}
    return modules


def violations(path: Path, part: str) -> list[str]:
    found = []
    for module in imported(path):
        top, _, rest = module.partition(".")
        if top == "thresher":
            target = rest.partition(".")[0]
            target = target if (SOURCE / target).is_dir() or (SOURCE / f"{target}.py").is_file() else "__init__"
            if target not in MAY_IMPORT[part] | {part}:
                found.append(f"{path.relative_to(SOURCE)} imports thresher.{target}")
        where = path.relative_to(SOURCE).as_posix()
        if top in ONLY_IN and not any(where == place or where.startswith(f"{place}/") for place in ONLY_IN[top]):
            found.append(f"{where} imports {top}")
    return found


@pytest.mark.parametrize(("path", "part"), parts(), ids=lambda value: value if isinstance(value, str) else value.stem)
def test_imports_follow_the_layers(path: Path, part: str) -> None:
    assert violations(path, part) == []


def test_a_forbidden_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attention").mkdir()
    bad = tmp_path / "attention" / "bad.py"
    bad.write_text("from thresher.hosts.core import mount\nimport timm.layers\nfrom thresher import tasks\n")
    (tmp_path / "hosts").mkdir()
    (tmp_path / "tasks").mkdir()
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    assert len(violations(bad, "attention")) == 3


def test_files_stay_short() -> None:
    long = {path.name: n for path, _ in parts() if (n := len(path.read_text().splitlines())) > 400}
    assert not long
