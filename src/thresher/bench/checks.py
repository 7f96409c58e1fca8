"""Whether a mechanism is what it says it is, on small inputs, before it may be timed.

At its `dense_limit` it must be softmax attention: outputs, gradients, and as many pairs and MACs as dense. A stochastic
one must come nearer to its `expectation` with its `precise` hyper-parameters. A fast backend must do what the reference
does. The contract tests look closer; these look at the very hyper-parameters, backend, device and type that are about
to be timed.
"""

from dataclasses import replace

import torch
from torch import Tensor

from thresher.attention.base import Attended, Call, Mechanism
from thresher.attention.thresholds import Thresholded
from thresher.bench.inputs import Inputs, dense, keep_share, random_inputs
from thresher.bench.jobs import REFERENCE, Job, Scene, backends_of, build, mechanism_class, pattern_of

TOKENS = 1024  # at most
BATCH, HEADS, DRAWS = 2, 2, 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the largest
BACKEND_FACTOR = 100  # of that tolerance, relative in norm
SHARE_TOLERANCE = 2e-3  # of the visible pairs


def check(job: Job, scene: Scene) -> None:
    """Check a mechanism at the hyper-parameters, backend, device and type of a job.

    Raises:
        AssertionError: It is not what it promises to be; the message says where.
    """
    cls = mechanism_class(job.target or "")
    n = min(job.n, TOKENS)
    inputs = random_inputs(scene, n, BATCH, HEADS, cls.needs_source)
    if cls.dense_limit is not None:
        check_dense_limit(job, scene, inputs)
    if cls.stochastic and cls.precise is not None:
        check_convergence(job, scene, inputs)
    if not cls.stochastic and job.backend not in (None, REFERENCE) and REFERENCE in backends_of(cls):
        check_backend(job, scene, inputs)


def check_dense_limit(job: Job, scene: Scene, inputs: Inputs) -> None:
    """Compare a mechanism at its dense limit with softmax attention in fp64."""
    mechanism = _seeded(job, scene, **(mechanism_class(job.target or "").dense_limit or {}))
    wanted_inputs = inputs.double().fresh()
    wanted = dense(pattern_of(job), wanted_inputs)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(wanted)
    wanted_gradients = torch.autograd.grad(wanted, wanted_inputs.leaves(), direction)
    for training in (False, True):
        mechanism.train(training)
        fresh = inputs.fresh()
        attended: Attended = mechanism(fresh.q, fresh.k, fresh.v, Call(source=fresh.source))
        _compare("output", attended.out, wanted, scene)
        found = torch.autograd.grad(attended.out, fresh.leaves(), direction.to(attended.out.dtype), allow_unused=True)
        names = ("q", "k", "v") if inputs.source is None else ("q", "k", "x", "weight")
        for name, gradient, reference in zip(names, found, wanted_gradients, strict=True):
            assert gradient is not None, f"at the dense limit {name} gets no gradient"
            _compare(f"gradient of {name}", gradient, reference, scene)
        cost = attended.cost
        assert torch.equal(cost.kept, cost.visible), "at the dense limit it does not keep every visible pair"
        assert ((cost.total - cost.dense).abs() <= 1e-5 * cost.dense).all(), (
            "its dense limit does not cost what dense does"
        )


def check_convergence(job: Job, scene: Scene, inputs: Inputs) -> None:
    """Compare the distance to the expectation at a job's hyper-parameters and at precise ones."""
    usual = _error(_seeded(job, scene), inputs)
    precise = _error(_seeded(job, scene, **(mechanism_class(job.target or "").precise or {})), inputs)
    assert precise <= usual / 1.5, (
        f"at its precise hyper-parameters it is off its expectation by {precise:.3g}, at these by {usual:.3g}: "
        "more samples should bring it nearer"
    )


def check_backend(job: Job, scene: Scene, inputs: Inputs) -> None:
    """Compare a backend with the reference where pairs are dropped, which the dense limit never does."""
    mechanism = _seeded(job, scene)
    reference = _seeded(replace(job, backend=REFERENCE), scene)
    if job.kept is not None and isinstance(mechanism, Thresholded):
        keep_share(mechanism, inputs.q, inputs.k, Call(), job.kept)
    reference.load_state_dict(mechanism.state_dict())
    direction = torch.randn(inputs.v.shape, generator=torch.Generator().manual_seed(1)).to(inputs.v)
    results = []
    for one in (mechanism, reference):
        fresh = inputs.fresh()
        attended = one.train()(fresh.q, fresh.k, fresh.v, Call(source=fresh.source))
        wanted = fresh.leaves() + [p for p in one.parameters() if p.requires_grad]
        found = torch.autograd.grad(attended.out, wanted, direction.to(attended.out.dtype), allow_unused=True)
        results.append((attended, found))
    (fast, fast_gradients), (plain, plain_gradients) = results
    share, wanted_share = (float(x.cost.kept.detach().sum() / x.cost.visible.sum()) for x in (fast, plain))
    assert abs(share - wanted_share) <= SHARE_TOLERANCE, (
        f"{job.backend} keeps {share:.4f} of the pairs, its reference {wanted_share:.4f}"
    )
    _agree(f"{job.backend}'s output", fast.out, plain.out, scene)
    for name, gradient, reference_gradient in zip("qkv", fast_gradients, plain_gradients, strict=False):
        assert gradient is not None, f"on {job.backend} {name} gets no gradient"
        _agree(f"{job.backend}'s gradient of {name}", gradient, reference_gradient, scene)
    thresholds = zip(fast_gradients[3:], plain_gradients[3:], strict=True)
    for gradient, reference_gradient in thresholds:
        assert (gradient is None) == (reference_gradient is None), f"{job.backend} trains other parameters"


def _agree(what: str, got: Tensor, wanted: Tensor, scene: Scene) -> None:
    """Compare norms: a tie that rounding breaks the other way moves a row, not the whole."""
    off = float((got - wanted).detach().double().norm() / wanted.detach().double().norm())
    limit = BACKEND_FACTOR * TOLERANCE[scene.torch_dtype]
    assert off <= limit, f"{what} is off the reference's by {off:.1e}, more than {limit:g}"


@torch.no_grad()
def _error(mechanism: Mechanism, inputs: Inputs) -> float:
    """Return the root mean squared distance of outputs to their expectation, in training, over a few draws."""
    mechanism.train()
    call = Call(source=inputs.source)
    wanted = mechanism.expectation(inputs.q, inputs.k, inputs.v, call).float()
    outs = [mechanism(inputs.q, inputs.k, inputs.v, call).out.float() for _ in range(DRAWS)]
    return float(torch.stack([(out - wanted).square().mean() for out in outs]).mean().sqrt())


def _seeded(job: Job, scene: Scene, **changes: object) -> Mechanism:
    torch.manual_seed(scene.seed)
    return build(job, HEADS, scene.head_dim, **changes).to(scene.device)


def _compare(what: str, got: Tensor, wanted: Tensor, scene: Scene) -> None:
    assert got.shape == wanted.shape, f"at the dense limit the {what} has shape {tuple(got.shape)}"
    worst = float((got.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())
    limit = TOLERANCE[scene.torch_dtype]
    assert worst <= limit, (
        f"at the dense limit the {what} is off by {worst:.1e} of its largest value, more than {limit:g}"
    )
