"""Real runs for the report: two mechanisms, one of them with two seeds, an evaluation, and one that failed."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import chromium
from tests.running import CONF, run_eval, tiny_config
from tests.tools.report.browsing import Opened
from thresher.run import train as training
from thresher.tools.report.__main__ import main
from thresher.tools.report.summary import Summary, summarise

HOSTILE = "<script>alert(1)<"  # a folder's name holds no slash
SHORT = ("trainer.max_epochs=1", "callbacks.watch.moved=0")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "runs"
    training.train(tiny_config(root / "dense", "attention=dense", "compute=free", *SHORT))
    for seed in (0, 1):
        training.train(tiny_config(root / f"latte{seed}", "compute.target=0.5", f"seed={seed}", *SHORT))
    ckpt = f"ckpt='{root}/latte0/checkpoints/best.ckpt'"
    run_eval([ckpt, "attention.estimate.bits=8", "explain.example=[0,3]", f"run.dir='{root}/est8'"], CONF)
    shutil.copytree(root / "latte0", root / HOSTILE, ignore=shutil.ignore_patterns("metrics.json"))
    (root / HOSTILE / "train.log").write_text("[now][thresher][INFO] - begun\n[now][x][ERROR] - <b>out of memory</b>\n")
    return root


@pytest.fixture(scope="session")
def summary(runs: Path) -> Summary:
    return summarise([runs], CONF, lambda sequence, title: sequence)


@pytest.fixture(scope="session")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which a run that counts has a hostile name too, and a config with one."""
    root = tmp_path_factory.mktemp("hostile") / "runs"
    shutil.copytree(runs, root)
    shutil.copytree(root / "latte1", root / "<img src=x onerror=alert(1)>")
    config = root / "<img src=x onerror=alert(1)>" / "config.yaml"
    plain = yaml.safe_load(config.read_text())
    plain["data"]["augment"] = "</script><script>alert(1)</script><b>"
    config.write_text(yaml.safe_dump(plain))
    assert main([f"runs='{root}'"]) == 0
    return root / "report.html"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report)
    yield opened
    assert opened.complaints == []
    opened.page.close()
