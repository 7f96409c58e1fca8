"""MCA's kernel draws the features that PyTorch draws, and computes the same values and gradients within rounding."""

import pytest
import torch
from torch import Tensor

from tests.kernels.threads import with_threads
from thresher.attention import Call, Pattern
from thresher.attention.mca import kernel
from thresher.attention.mca.mechanism import Mca, compute_chances
from thresher.kernels.build import can_use
from thresher.testing.checks import check_compiled_equals_eager
from thresher.testing.inputs import draw, gradients, padded

pytestmark = pytest.mark.skipif(not can_use("mca"), reason="there is no C++ compiler that builds the kernel")
FROM_THE_COMPILER = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
PATTERNS = [Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS]


def pair(pattern: Pattern = Pattern.NONCAUSAL_SELF, head_dim: int = 8, **hyperparameters: object) -> tuple[Mca, Mca]:
    """Return the kernel and PyTorch."""
    kernel, plain = (
        Mca(2, head_dim, pattern, backend=backend, **hyperparameters).train()  # type: ignore[arg-type]
        for backend in ("cpu", "reference")
    )
    return kernel, plain


def given(
    b: int, m: int, d: int, groups: int, dv: int, draws: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Return what the operator takes: counts from none to all numbers."""
    torch.manual_seed(0)
    x, rows = torch.randn(b, m, d, dtype=dtype), torch.randn(groups, d, dv, dtype=dtype)
    chances = compute_chances(rows.mT)
    uniform = torch.rand(m, draws, groups, d, dtype=dtype)
    counts = torch.randint(0, d + 1, (b, groups, m)).to(dtype)
    counts[:, :, ::5], counts[:, :, 1::5] = d, 0
    return x, rows, chances, chances.cumsum(-1), uniform, counts


def by_definition(x: Tensor, rows: Tensor, chances: Tensor, uniform: Tensor, counts: Tensor) -> Tensor:
    """Return the values, one draw after the other."""
    (b, m, d), (groups, _, dv) = x.shape, rows.shape
    values = []
    for example in range(b):
        for g in range(groups):
            for j in range(m):
                r, total = int(counts[example, g, j]), torch.zeros(dv, dtype=x.dtype)
                for u in uniform[j, example % uniform.shape[1], g, :r]:
                    k = min(int((chances[g].cumsum(-1) <= u).sum()), d - 1)
                    total = total + x[example, j, k] * rows[g, k] / (r * chances[g, k])
                values.append(total)
    return torch.stack(values).view(b, groups, m, dv)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("m", "d", "groups", "dv"), [(1, 1, 1, 1), (7, 5, 3, 2), (40, 24, 2, 19), (66, 70, 1, 64)])
def test_values_and_gradients_are_those_of_the_definition(m: int, d: int, groups: int, dv: int, draws: int) -> None:
    x, rows, chances, cumulated, uniform, counts = given(3, m, d, groups, dv, draws)
    found = []
    for compute in (
        lambda x, rows: kernel.encode(x, rows, chances, cumulated, uniform, counts),
        lambda x, rows: by_definition(x, rows, chances, uniform, counts),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, rows)]
        values = compute(*leaves)
        weight = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)
        found.append([values.detach(), *torch.autograd.grad((values * weight).sum(), leaves)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("alpha", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "option", [{}, {"grad": "exact"}, {"reproduce_paper": True}, {"sampling": {"resample": "never"}}], ids=str
)
def test_a_mechanism_computes_what_pytorch_does(
    pattern: Pattern, alpha: float, training: bool, option: dict[str, object]
) -> None:
    ours, plain = (mechanism.train(training) for mechanism in pair(pattern, alpha=alpha, **option))
    n, m = (30, 37) if pattern.cross else (37, 37)
    inputs = draw(ours, lengths=(n, m), value_dim=11)
    bias = torch.randn(1, 2, n, m, dtype=torch.float64)
    calls = [Call(), padded(pattern, lengths=(n, m)), padded(pattern, lengths=(n, m), left=True), Call(bias=bias)]
    for call in calls:
        found = []
        for mechanism in (ours, plain):
            torch.manual_seed(1)
            found.append(gradients(mechanism, inputs, call))
        (one, grads), (other, wanted) = found
        torch.testing.assert_close(one.out, other.out, rtol=1e-10, atol=1e-10)
        assert all(torch.equal(a, b) for a, b in zip(one.cost, other.cost, strict=True))
        assert grads.keys() == wanted.keys()
        for name, reference in wanted.items():
            if reference is None:
                assert grads[name] is None
            else:
                torch.testing.assert_close(grads[name], reference, rtol=1e-10, atol=1e-10)


def test_rounding_is_within_twice_that_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    *most, counts = given(2, 90, 200, 2, 48, 2, torch.float32)
    counts = counts.clamp_max(199)  # PyTorch draws none where all are wanted
    x, rows, chances, _, uniform = most
    inputs = (*most, counts)
    plain = Mca(2, 48, Pattern.NONCAUSAL_SELF, backend="reference")
    monkeypatch.setattr(plain, "draw_uniform", lambda *_: uniform)
    usual = (x[:, None] * plain.sample(chances, counts, 200)) @ rows
    exact = kernel.encode(*(t.double() for t in inputs))

    def error(one: Tensor) -> float:
        return float((one.double() - exact).norm() / exact.norm())

    assert error(kernel.encode(*inputs)) < 2 * error(usual) + 1e-8
    assert 0 < error(usual) < 1e-6


def test_what_is_no_number_stays_none() -> None:
    """A count, a feature that is drawn, and weights that are none."""
    x, rows, chances, cumulated, uniform, counts = given(1, 6, 8, 1, 4, 1)
    counts[0, 0] = torch.tensor([float("nan"), 0, 8, 8, 3, 3])
    x[0, 3, 2] = float("nan")
    values = kernel.encode(x, rows, chances, cumulated, uniform, counts)[0, 0]
    assert values.isnan().all(-1).tolist()[:4] == [True, False, False, True]
    assert values[[1, 2, 4, 5]].isfinite().all()
    assert (values[1] == 0).all()
    none = torch.full_like(chances, float("nan"))
    assert kernel.encode(x, rows, none, none, uniform, counts)[0, 0, 4].isnan().all()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    inputs = given(2, 300, 40, 2, 24, 2, torch.float32)
    grad = torch.randn(2, 2, 300, 24)
    found = with_threads(lambda: [kernel.encode(*inputs), *kernel.back(grad, *inputs)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@FROM_THE_COMPILER
def test_operators_keep_pytorchs_contract() -> None:
    inputs = given(2, 9, 6, 2, 5, 1)
    x, rows, *rest = inputs
    torch.library.opcheck(kernel.encode, (x.requires_grad_(), rows.requires_grad_(), *rest))
    torch.library.opcheck(kernel.back, (torch.randn(2, 2, 9, 5, dtype=torch.float64), *given(2, 9, 6, 2, 5, 1)))


@pytest.mark.slow
@FROM_THE_COMPILER
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_generated_code_equals_eager(pattern: Pattern) -> None:
    check_compiled_equals_eager(pair(pattern)[0], backend="aot_eager")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sampling": {"distribution": "poisson"}}, "no Poisson sampling"),
        ({"sampling": {"draws": "shared"}}, "no draws that tokens share"),
        ({"sampling": {"draws": "shared"}, "path": "gather"}, "no draws that tokens share"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_is_refused_or_left_to_pytorch(option: dict[str, object], message: str) -> None:
    ours, plain = pair(**option)
    inputs = draw(ours, lengths=(20, 20))
    with pytest.raises(ValueError, match=f"backend=cpu cannot compute this call of Mca: .*{message}"):
        gradients(ours, inputs, Call())
    ours.backend = "auto"
    found = []
    for mechanism in (ours, plain):
        torch.manual_seed(0)
        found.append(gradients(mechanism, inputs, Call())[0].out)
    assert torch.equal(*found)
