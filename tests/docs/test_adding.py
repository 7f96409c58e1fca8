"""The guide to a mechanism of one's own works as written: its folder, its options, its kernel."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import thresher.attention
from tests.running import CONF
from thresher import testing
from thresher.attention import Call, Mechanism, Pattern, name_of
from thresher.kernels import build

GUIDE = (CONF.parent / "docs" / "adding.md").read_text()
FILES = re.findall(
    r"```(?:python|cpp)\n(?:#|//) src/thresher/(attention/local/[\w/.]+)\n(.*?)```", GUIDE, flags=re.DOTALL
)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of the guide, written beside the package and imported as a part of it."""
    root = tmp_path_factory.mktemp("thresher")
    for name, text in FILES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresher.attention, "__path__", [*thresher.attention.__path__, str(root / "attention")])
        patch.setattr(build, "PACKAGE", root)
        yield import_module("thresher.attention.local").Local
    for name in [name for name in sys.modules if name.startswith("thresher.attention.local")]:
        del sys.modules[name]


def test_all_files_are_shown() -> None:
    names = {Path(name).name for name, _ in FILES}
    assert names == {"__init__.py", "options.py", "mechanism.py", "cpu.py", "kernel.py", "local.cpp"}


def test_it_keeps_the_contract_by_both_ways(local: type[Mechanism]) -> None:
    assert name_of(local) == "local"
    testing.check(local)
    testing.check(local, backend="reference")


@pytest.mark.parametrize("pattern", [Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF])
@pytest.mark.parametrize("window", [{"before": 3, "after": 1}, {"before": 0}, {"before": 99, "after": 99}])
def test_the_kernel_computes_the_reference(local: type[Mechanism], pattern: Pattern, window: dict[str, int]) -> None:
    q, k, v = torch.randn(3, 2, 2, 33, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    make = {"num_heads": 2, "head_dim": 8, "pattern": pattern, "window": window}
    fast, plain = (local(**make, backend=backend)(q, k, v, Call()) for backend in ("cpu", "reference"))  # type: ignore[arg-type]
    assert_close(fast.out, plain.out, atol=1e-12, rtol=1e-12)
    assert all(map(torch.equal, fast.cost, plain.cost))
    assert not plain.cost.select.any()


def test_what_the_kernel_lacks_is_refused(local: type[Mechanism]) -> None:
    q = torch.randn(3, 1, 2, 5, 8, requires_grad=True)
    built = local(2, 8, Pattern.NONCAUSAL_SELF, backend="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend=cpu cannot compute this call of Local: it has no backward"):
        built(*q, Call())


def test_an_option_that_does_not_exist_is_refused(local: type[Mechanism]) -> None:
    with pytest.raises(ValueError, match=r"there is no option window\.befor; did you mean window\.before\?"):
        local(2, 8, Pattern.NONCAUSAL_SELF, window={"befor": 3})  # type: ignore[call-arg]
