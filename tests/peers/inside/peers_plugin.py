"""Pytest plugin: put a mechanism into every model that the tests of a library build, and write down how each test ends.

It runs inside a child process (see `tests/peers/running.py`), among tests that are not ours. This folder is on the
path there and the repository is not, for the libraries' own tests are a package `tests`, too.
"""

import importlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

DENSE_LIMIT: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk": {"keys": 10_000},
    "latte": {"threshold": math.inf, "estimate": {"bits": "exact"}},
}
WITHOUT = "without"  # the mode that leaves models alone
Write = Callable[..., None]


class Sparsifier:
    """Puts one mechanism into models, and writes down each model that it reached or could not reach.

    Args:
        mode: A key of `DENSE_LIMIT`.
        write: Takes what is to be written down, as keywords.
    """

    def __init__(self, mode: str, write: Write) -> None:
        self.mode = mode
        self.write = write
        self._busy = False

    def __call__(self, model: torch.nn.Module, examples: list[Any]) -> None:
        """Sparsify `model` in place with the first of the example inputs that serves; leave it dense if none does."""
        if self._busy or any(parameter.is_meta for parameter in model.parameters()):
            return
        import thresher
        from thresher.hosts import mounted

        self._busy = True
        try:
            if mounted(model):
                return
            refusals = []
            with torch.random.fork_rng(devices=[]):
                for example in examples:
                    try:
                        names = thresher.sparsify(model, self.mode, example_inputs=example, **DENSE_LIMIT[self.mode])
                    except Exception as error:
                        refusals.append(f"{type(error).__name__}: {error}"[:300])
                    else:
                        self.write(model=type(model).__name__, mechanisms=len(names))
                        return
            self.write(model=type(model).__name__, mechanisms=0, refusals=refusals)
        finally:
            self._busy = False


class Recorder:
    """Writes one line of JSON for each test that begins and each that ends."""

    def __init__(self, write: Write) -> None:
        self.write = write

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        failed = report.failed
        if report.when == "call" or failed or report.skipped:
            self.write(test=report.nodeid, outcome=report.outcome, error=_error(report) if failed else "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", error=str(report.longrepr)[-1000:])


class Selection:
    """Keeps some tests.

    Args:
        models: Those whose parameter `model_name` is among these; all if there are none.
        tests: Those with these names; all if there are none.
    """

    def __init__(self, models: set[str], tests: set[str]) -> None:
        self.models = models
        self.tests = tests

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, out = [], []
        for item in items:
            model = not self.models or _model_name(item) in self.models
            (kept if model and (not self.tests or item.nodeid in self.tests) else out).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=out)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peers")
    group.addoption("--peers-mode", choices=[WITHOUT, *DENSE_LIMIT], default=WITHOUT, help="the mechanism")
    group.addoption("--peers-library", choices=["transformers", "timm"], help="whose models are sparsified")
    group.addoption("--peers-log", type=Path, help="the file for what happened, in lines of JSON")
    group.addoption("--peers-models", default="", help="only tests of these values of `model_name`, parted by commas")
    group.addoption("--peers-tests", type=Path, help="a file that names the only tests to run, one a line")


def pytest_configure(config: pytest.Config) -> None:
    path: Path = config.getoption("--peers-log")

    def write(**line: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    config.pluginmanager.register(Recorder(write))
    library = importlib.import_module(f"peers_{config.getoption('--peers-library')}")
    stack = ExitStack()
    config.add_cleanup(stack.close)
    models = set(filter(None, config.getoption("--peers-models").split(",")))
    tests = config.getoption("--peers-tests")
    config.pluginmanager.register(Selection(models, set(tests.read_text().splitlines()) if tests else set()))
    if models:
        stack.enter_context(library.narrow(models))
    if (mode := config.getoption("--peers-mode")) != WITHOUT:
        stack.enter_context(library.watch(Sparsifier(mode, write)))


def _error(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr))[-2000:]


def _model_name(item: pytest.Item) -> str:
    call = getattr(item, "callspec", None)
    return str(call.params.get("model_name", "")) if call else ""
