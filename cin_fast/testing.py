"""What tests/ and bench/ share: inputs, shapes, and the rule by which a result is right.

The rule: against float64, a backend's error is at most twice the error of plain PyTorch in the
same dtype, plus the rounding of the result itself. Plain PyTorch's error is one draw of chance, so
where the first does not do, it is the largest of several orders of summation. A gradient of
:func:`~cin_fast.cci` jumps where a weight changes its sign: where rounding decides a sign, the
result of float64 is taken with the sign that the backend found (:class:`Undecided`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cin_fast import ops, pair, reference

INPUT_KINDS = ("randn", "diffuse", "relu")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (B, C, L): unit sizes, odd sizes, tails on both sides of a block, and an empty batch.
SHAPES = (
    (1, 1, 1),
    (2, 3, 1),
    (1, 1, 7),
    (2, 17, 5),
    (3, 64, 49),
    (2, 65, 33),
    (1, 130, 196),
    (2, 200, 197),
    (0, 8, 9),
)

# Seeds of the orders of summation that are tried where the order of the inputs does not do. The
# error of a single number is small by luck in one order, and hardly in eight.
ORDERS = range(7)

# A share of the weights, or a single one: more whose sign is open, and nothing is judged.
_MOST_UNDECIDED = 1e-4


def make_input(
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Features of one kind, the same on every device.

    ``randn``: rows of W nearly one-hot at L = 196. ``diffuse``: randn * L ** -0.25, rows spread
    out. ``relu``: what a network gives.

    Raises:
        ValueError: for an unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "diffuse":
        x = x * max(shape[-1], 1) ** -0.25
    elif kind == "relu":
        x = torch.relu(x) * 0.3
    elif kind != "randn":
        raise ValueError(f"kind: expected one of {', '.join(INPUT_KINDS)}, found {kind!r}")
    return x.to(device=device, dtype=dtype)


def make_pairs(batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A partner involution over ``batch`` images (the odd one out is its own) and eta values."""
    partner = torch.arange(batch) ^ 1
    partner[partner >= batch] = batch - 1
    eta = torch.linspace(-0.5, 1.5, batch) if batch else torch.zeros(0)
    return partner.to(device), eta.to(device)


def draw_order(size: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of ``size`` indices."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(device)


def in_order(
    call: Callable[[Tensor, Tensor | None], Tensor], seed: int | None, x: Tensor, v: Tensor | None
) -> Tensor:
    """``call(x, v)``, but every sum over channels, positions or columns in an order of ``seed``.

    ``x`` (B, C, L) and ``v`` (B, C, K) or None are permuted and the result, (B, C, K) or
    (B, C, L), is permuted back; so are gradients. Without a seed it is the call alone.
    """
    if seed is None:
        return call(x, v)
    channels, positions = (draw_order(size, seed, x.device) for size in x.shape[1:])
    columns = positions if v is None else draw_order(v.shape[-1], seed, x.device)
    y = call(x[:, channels][..., positions], None if v is None else v[:, channels][..., columns])
    return y[:, channels.argsort()][..., columns.argsort()]


@dataclass(frozen=True)
class Evaluation:
    """An operator's value and the gradients of ``(value * dy).sum()``, by name."""

    results: dict[str, Tensor]


def evaluate_sci(
    x: Tensor,
    v: Tensor | None,
    dy: Tensor,
    scale: float = -1.0,
    backend: str | None = None,
    order: int | None = None,
) -> Evaluation:
    """``sci`` of one backend, forward and backward; ``backend="torch"`` is plain PyTorch.

    ``order``, for plain PyTorch alone, is a seed for :func:`in_order`.
    """
    leaves = _leaves(x=x, v=v)
    x, v = leaves["x"], leaves.get("v")
    if backend == "torch":
        y = in_order(lambda x, v: reference.sci(x, x if v is None else v, scale), order, x, v)
    else:
        y = ops.sci(x, v, scale=scale, backend=backend)
    return _evaluation(y, dy, leaves)


def evaluate_cci(
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor | None,
    dy: Tensor,
    scale: float = -1.0,
    backend: str | None = None,
    order: int | None = None,
) -> Evaluation:
    """``cci`` of one backend, forward and backward; ``backend="torch"`` is plain PyTorch.

    ``order``, for plain PyTorch alone, is a seed for :func:`in_order`.
    """
    leaves = _leaves(x=x, eta=eta, v=v)
    x, eta, v = leaves["x"], leaves["eta"], leaves.get("v")
    if backend == "torch":
        y = in_order(
            lambda x, v: reference.cci(x, partner, eta, x if v is None else v, scale)[0],
            order,
            x,
            v,
        )
    else:
        y = ops.cci(x, partner, eta, v, scale=scale, backend=backend)
    return _evaluation(y, dy, leaves)


def make_psi(
    channels: int, bias: float, dtype: torch.dtype = torch.float32, seed: int = 7
) -> tuple[Tensor, Tensor]:
    """psi's weight (1, 2 ``channels``) and bias (1,): eta is near ``bias``."""
    weight = make_input("randn", (1, 2 * channels), torch.float64, seed=seed) / (8 * channels)
    return weight.to(dtype), torch.full((1,), bias, dtype=dtype)


def make_pair_inputs(
    shape: tuple[int, ...], columns: int, kind: str, dtype: torch.dtype, bias: float
) -> tuple[Tensor, ...]:
    """What :func:`evaluate_pair` takes first, x to dy_pair, v of so many columns."""
    values = (*shape[:2], columns)
    return (
        make_input(kind, shape, dtype),
        make_pairs(shape[0])[0],
        *make_psi(shape[1], bias, dtype),
        *(make_input("randn", values, dtype, seed=seed) for seed in (2, 1, 3)),
    )


def evaluate_pair(
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    dy: Tensor,
    dy_pair: Tensor,
    scale: float = -1.0,
    backend: str | None = None,
) -> Evaluation:
    """``pair_columns``, the last column being the mean; ``backend="torch"`` is plain PyTorch."""
    leaves = _leaves(x=x, psi_weight=psi_weight, psi_bias=psi_bias, v=v)
    x, psi_weight, psi_bias, v = leaves.values()
    mean = v.shape[-1] - 1
    if backend == "torch":
        y = reference.sci(x, v, scale)
        eta = reference.eta(y[..., mean], partner, psi_weight, psi_bias)
        y_pair, _ = reference.cci(x, partner, eta, v, scale)
    else:
        y, y_pair = pair.pair_columns(
            x, partner, psi_weight, psi_bias, v, mean=mean, scale=scale, backend=backend
        )
    evaluation = _evaluation(torch.cat([y, y_pair]), torch.cat([dy, dy_pair]), leaves)
    y, y_pair = evaluation.results.pop("y").chunk(2)
    return Evaluation({"y": y, "y_pair": y_pair, **evaluation.results})


@dataclass(frozen=True)
class Truth:
    """An operator's results by name, in float64 and of plain PyTorch in the inputs' dtype."""

    exact: dict[str, Tensor]
    plain: dict[str, Tensor]


def find_truth(evaluate: Callable[..., Evaluation], *inputs: Any, **settings: Any) -> Truth:
    """Of one of the ``evaluate_`` functions, given its arguments."""
    double = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    exact, plain = (evaluate(*some, **settings, backend="torch") for some in (double, inputs))
    return Truth(exact.results, plain.results)


def check_sci(
    backend: str,
    x: Tensor,
    v: Tensor | None,
    dy: Tensor,
    scale: float = -1.0,
    truth: Truth | None = None,
) -> Evaluation:
    """Hold ``sci`` of ``backend`` to the rule, values and gradients; returns what it computed.

    ``truth``, of the same arguments, saves finding it once more.
    """
    actual = evaluate_sci(x, v, dy, scale, backend)
    _check(backend, actual, partial(evaluate_sci, scale=scale), (x, v, dy), truth)
    return actual


def check_cci(
    backend: str,
    x: Tensor,
    partner: Tensor,
    eta: Tensor,
    v: Tensor | None,
    dy: Tensor,
    scale: float = -1.0,
) -> Evaluation:
    """Hold ``cci`` of ``backend`` to the rule, values and gradients; returns what it computed."""
    actual = evaluate_cci(x, partner, eta, v, dy, scale, backend)
    _check(
        backend,
        actual,
        partial(evaluate_cci, scale=scale),
        (x, partner, eta, v, dy),
        undecided=lambda: Undecided(x, partner, eta, v, dy, scale),
    )
    return actual


def check_pair(
    backend: str,
    x: Tensor,
    partner: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    v: Tensor,
    dy: Tensor,
    dy_pair: Tensor,
    scale: float = -1.0,
    truth: Truth | None = None,
) -> Evaluation:
    """Hold ``pair_columns`` of ``backend`` to the rule; returns what it computed.

    But for psi's bias, one number: its error is chance. eta has to be below 0, where no weight is
    near |M|'s corner: elsewhere rounding may decide a gradient. ``truth`` as for :func:`check_sci`.
    """
    inputs = (x, partner, psi_weight, psi_bias, v, dy, dy_pair, scale)
    actual = evaluate_pair(*inputs, backend)
    truth = truth or find_truth(evaluate_pair, *inputs)
    for name in actual.results.keys() - {"dpsi_bias"}:
        results = actual.results[name], truth.plain[name], truth.exact[name]
        assert_exact_as_torch(f"{backend} {name} {tuple(x.shape)}", *results)
    return actual


class Undecided:
    """Weights M = P_i - eta_i P_partner(i) of ``cci`` on either side of 0, as float32 can tell.

    |M| has a corner at 0, where its gradient jumps by twice dP = dy v^T: which side a weight is on
    decides, and float64 is no more right than another sum. With t = scale x x^T and float32's eps,
    a kernel's t, and so log P but for the softmax's sum, is off by about

        dt = eps (4 + (2 + sqrt(L)) |scale| |x| |x|^T),

    sqrt(L) for L products added with random roundings, 2 for the two factors that make t an
    exponent, 4 for exp, sum and division. P = softmax(t) is then off by P (dt + rowsum(P dt)), M
    by that of both images, and a weight is undecided if |M| is less. Half precision counts as
    float32: its products are exact there, and P is computed in it.

    ``count`` weights are undecided; ``too_many`` if that is more than 1e-4 of all, and not just
    one: then the signs are float64's.
    """

    def __init__(
        self,
        x: Tensor,
        partner: Tensor,
        eta: Tensor,
        v: Tensor | None,
        dy: Tensor,
        scale: float = -1.0,
    ) -> None:
        """Of :func:`evaluate_cci`'s arguments, in any dtype."""
        v, dy = (x if v is None else v).double(), dy.double()
        self._leaves = [t.detach().double().requires_grad_() for t in (x, eta)]
        self._scale = scale
        self._partner = partner
        x, eta = self._leaves
        eta_B11 = eta[:, None, None]
        self._p_BCC = reference.sci_weights(x, scale)
        m_BCC = self._p_BCC - eta_B11 * self._p_BCC[partner]
        error_BCC = _error_of_weights(x.detach(), self._p_BCC.detach(), scale)
        open_BCC = m_BCC.abs() < error_BCC + eta_B11.abs() * error_BCC[partner]
        self.count = int(open_BCC.sum())
        self.too_many = self.count > max(1, _MOST_UNDECIDED * open_BCC.numel())
        self._image_U, self._row_U, self._column_U = open_BCC.nonzero(as_tuple=True)
        self._m_U = m_BCC[open_BCC]
        self._dp_U = (dy[self._image_U, self._row_U] * v[self._image_U, self._column_U]).sum(-1)

    def __str__(self) -> str:
        return f"{self.count} weights undecided" + ", too many to judge" * self.too_many

    def resolve(self, results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """``exact`` with those signs of undecided weights, -1, 0 or 1, that ``results`` has.

        They are read off the error of ``results["dx"]``; d eta has to agree with the same signs.
        """
        if self.too_many or not self.count:
            return exact
        sign_U = self._m_U.detach().sign()
        change_U, dx, deta = torch.zeros_like(sign_U), exact["dx"], exact["deta"]
        # Parts of a gradient that overlap are told apart in a second look.
        for _ in range(3):
            error_BCL = results["dx"].double() - dx
            found_U = change_U + self._share_of(error_BCL).round()
            found_U = found_U.clamp(-1 - sign_U, 1 - sign_U)
            if torch.equal(found_U, change_U):
                break
            change_U = found_U
            changed = torch.autograd.grad(
                self._m_U, self._leaves, change_U * self._dp_U, retain_graph=True
            )
            dx, deta = exact["dx"] + changed[0], exact["deta"] + changed[1]
        return {**exact, "dx": dx, "deta": deta}

    @torch.no_grad()
    def _share_of(self, error_BCL: Tensor) -> Tensor:
        """How much a sign has to change for ``error_BCL``, (U,), judged by its row and column."""
        x, eta = self._leaves
        y = self._p_BCC @ x
        row_U, column_U = self._row_U, self._column_U
        other_U = self._partner[self._image_U]
        dot_U = square_U = torch.zeros_like(self._dp_U)
        same_U1 = (row_U == column_U)[:, None].double()
        for image_U, dp_U in (
            (self._image_U, self._dp_U),
            (other_U, -eta[self._image_U] * self._dp_U),
        ):
            # dx = scale (dS + dS^T) x with dS = dP P_rc (e_c - P_r) in row r alone.
            p_U1 = self._p_BCC[image_U, row_U, column_U][:, None]
            own_U1 = self._p_BCC[image_U, row_U, row_U][:, None]
            x_row_UL, x_column_UL = x[image_U, row_U], x[image_U, column_U]
            factor_U1 = self._scale * dp_U[:, None] * p_U1
            at_row_UL = factor_U1 * (
                x_column_UL - y[image_U, row_U] + (same_U1 - own_U1) * x_row_UL
            )
            at_column_UL = factor_U1 * (1 - p_U1) * (1 - same_U1) * x_row_UL
            for part_UL, index_U in ((at_row_UL, row_U), (at_column_UL, column_U)):
                dot_U = dot_U + (part_UL * error_BCL[image_U, index_U]).sum(-1)
                square_U = square_U + part_UL.square().sum(-1)
        # A part that six times the error's spread hides is no evidence: the sign stays float64's.
        evident_U = square_U > 36 * error_BCL.square().mean()
        return torch.where(evident_U, dot_U / square_U, 0.0)


def _error_of_weights(x_BCL: Tensor, p_BCC: Tensor, scale: float) -> Tensor:
    """How far float32's weights are from ``p_BCC``: derived in :class:`Undecided`."""
    eps = torch.finfo(torch.float32).eps
    steps = 2 + x_BCL.shape[-1] ** 0.5
    dt_BCC = eps * (4 + steps * abs(scale) * (x_BCL.abs() @ x_BCL.abs().mT))
    return p_BCC * (dt_BCC + (p_BCC * dt_BCC).sum(-1, keepdim=True))


@dataclass(frozen=True)
class Standard:
    """What a result is held to.

    ``exact`` is float64's, ``torch_results`` pairs plain PyTorch's result, in one or several orders
    of summation, with what is exact for it. ``note`` is for the message of a failure.
    """

    exact: Tensor
    torch_results: Sequence[tuple[Tensor, Tensor]]
    note: str = ""

    def problem(self, actual: Tensor) -> str:
        """The error and what was allowed; nothing where ``actual`` keeps the rule."""
        if self.exact.numel() == 0:
            same = actual.shape == self.exact.shape
            return "" if same else f"shape {actual.shape}, not {self.exact.shape}"
        error = _largest(actual, self.exact)
        torch_error = max(_largest(*pair) for pair in self.torch_results)
        allowed = 2 * torch_error + _largest(self.exact.to(actual.dtype), self.exact)
        # A comparison that a NaN fails.
        if error <= allowed:
            return ""
        return (
            f"error {error:.3e} against float64, allowed {allowed:.3e} "
            f"(plain PyTorch {torch_error:.3e}, orders: {len(self.torch_results)}, "
            f"{actual.dtype}, shape {tuple(actual.shape)}){self.note and f'; {self.note}'}"
        )


def assert_exact_as_torch(
    name: str,
    actual: Tensor,
    torch_result: Tensor,
    exact: Tensor,
    doubt: Callable[[], Standard] | None = None,
) -> None:
    """The rule for one tensor; ``doubt`` is called only where it would fail, and then decides.

    Raises:
        AssertionError: naming ``name``, the error, and what was allowed.
    """
    problem = Standard(exact, [(torch_result, exact)]).problem(actual)
    if problem and doubt is not None:
        problem = doubt().problem(actual)
    if problem:
        raise AssertionError(f"{name}: {problem}")


def _check(
    backend: str,
    actual: Evaluation,
    evaluate: Callable[..., Evaluation],
    inputs: tuple[Tensor | None, ...],
    truth: Truth | None = None,
    undecided: Callable[[], Undecided] | None = None,
) -> None:
    """The rule for all results: once one is in doubt, all are held to the same signs."""
    truth = truth or find_truth(evaluate, *inputs)
    exact, plain = truth.exact, truth.plain
    if not _problems(actual.results, exact, [(plain, exact)]):
        return
    orders = (evaluate(*inputs, backend="torch", order=seed).results for seed in ORDERS)
    ways = [plain, *orders]
    if undecided is None:
        problems = _problems(actual.results, exact, [(way, exact) for way in ways])
    else:
        weights = undecided()
        resolved = [(way, weights.resolve(way, exact)) for way in ways]
        own = weights.resolve(actual.results, exact)
        problems = _problems(actual.results, own, resolved, str(weights))
    if problems:
        raise AssertionError(f"{backend} {problems[0]}")


def _problems(
    actual: dict[str, Tensor],
    exact: dict[str, Tensor],
    ways: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
    note: str = "",
) -> list[str]:
    """What is wrong with each result that does not keep the rule."""
    found = []
    for name, result in actual.items():
        pairs = [(way[name], true[name]) for way, true in ways]
        if problem := Standard(exact[name], pairs, note).problem(result):
            found.append(f"{name}: {problem}")
    return found


def _leaves(**inputs: Tensor | None) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}


def _evaluation(y: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> Evaluation:
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return Evaluation({"y": y.detach(), **named})


def _largest(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()
