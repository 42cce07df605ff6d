"""cci: its value, its gradients, its arguments, and what torch does with the operator."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import cin_fast
from cin_fast.testing import INPUT_KINDS, SHAPES, check_cci, make_input, make_pairs


def test_value_is_the_papers_equation():
    x = make_input("diffuse", (4, 5, 3), torch.float64)
    partner, eta = torch.tensor([2, 1, 0, 3]), torch.tensor([0.3, 0.7, -0.4, 1.0]).double()
    w = torch.softmax(-x @ x.mT, -1)
    y = cin_fast.cci(x, partner, eta)
    # Images 0 and 2 are a pair: eta[0] is the paper's eta, eta[2] its gamma.
    torch.testing.assert_close(y[0], (w[0] - 0.3 * w[2]).abs() @ x[0], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(y[2], (w[2] + 0.4 * w[0]).abs() @ x[2], atol=1e-7, rtol=1e-6)
    # Image 1 stands alone: |W - 0.7 W| x; image 3 loses everything.
    torch.testing.assert_close(y[1], 0.3 * w[1] @ x[1], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(y[3], torch.zeros_like(y[3]))


def test_eta_zero_is_sci():
    x = make_input("relu", (4, 6, 5))
    partner, eta = make_pairs(4)
    torch.testing.assert_close(cin_fast.cci(x, partner, 0 * eta), cin_fast.sci(x))


def test_both_directions_of_a_pair_differ():
    x = make_input("diffuse", (2, 6, 5))
    partner = torch.tensor([1, 0])
    one = cin_fast.cci(x, partner, torch.tensor([0.2, 0.9]))
    other = cin_fast.cci(x, partner, torch.tensor([0.9, 0.2]))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_keeps_the_rule(kind, dtype):
    for shape in SHAPES:
        x = make_input(kind, shape, dtype)
        partner, eta = make_pairs(len(x))
        check_cci("reference", x, partner, eta, None, make_input("randn", shape, dtype, seed=1))


def test_gradients_to_second_order():
    x = make_input("diffuse", (3, 4, 3), torch.float64).requires_grad_()
    v = make_input("randn", (3, 4, 2), torch.float64, seed=1).requires_grad_()
    partner, eta = make_pairs(3)
    eta = eta.double().requires_grad_()

    def with_v(x, eta, v):
        return cin_fast.cci(x, partner, eta, v)

    def alone(x, eta):
        return cin_fast.cci(x, partner, eta)

    assert torch.autograd.gradcheck(alone, (x, eta))
    assert torch.autograd.gradcheck(with_v, (x, eta, v))
    assert torch.autograd.gradgradcheck(with_v, (x, eta, v))


@pytest.mark.parametrize("with_v", [False, True])
def test_opcheck(with_v):
    x = make_input("relu", (3, 5, 6)).requires_grad_()
    v = make_input("randn", (3, 5, 2)).requires_grad_() if with_v else None
    partner, eta = make_pairs(3)
    arguments = (x, partner, eta.requires_grad_(), v, -1.0)
    torch.library.opcheck(torch.ops.cin_fast.reference_cci, arguments)


def test_compiles_as_one_graph():
    x = make_input("relu", (4, 5, 6)).requires_grad_()
    partner, eta = make_pairs(4)

    def call(x, eta):
        return cin_fast.cci(x, partner, eta, backend="reference").square().sum()

    inputs = (x, eta.requires_grad_())
    expected = torch.autograd.grad(call(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(call, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def test_autocast_is_the_call_on_cast_inputs():
    x = make_input("relu", (4, 6, 9)).requires_grad_()
    partner, eta = make_pairs(4)
    eta.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cin_fast.cci(x, partner, eta)
    torch.testing.assert_close(y, cin_fast.cci(x.bfloat16(), partner, eta))
    y.float().sum().backward()
    assert x.grad.dtype == eta.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partner": torch.tensor([1, 2, 0])}, r"partner: expected an involution.*\[1, 2, 0\]"),
        ({"partner": torch.tensor([1, 0, 3])}, "partner: expected an involution"),
        ({"partner": torch.tensor([1, 0, -1])}, "partner: expected an involution"),
        ({"partner": torch.tensor([1, 0])}, r"partner: expected shape \(3,\).*\(2,\)"),
        ({"partner": torch.tensor([1, 0, 2]).int()}, "partner: expected an int64 tensor"),
        ({"partner": torch.zeros(3, dtype=torch.int64, device="meta")}, "partner: .* meta"),
        ({"partner": [1, 0, 2]}, "partner: expected an int64 tensor, found list"),
        ({"eta": torch.zeros(2)}, r"eta: expected shape \(3,\)"),
        ({"eta": torch.zeros(3, dtype=torch.int64)}, "eta: expected a floating-point tensor"),
        ({"eta": torch.zeros(3, device="meta")}, "eta: expected x's device"),
        ({"v": torch.zeros(3, 5, 2).half()}, "v: expected x's dtype"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "x": torch.zeros(3, 4, 5),
        "partner": torch.tensor([1, 0, 2]),
        "eta": torch.zeros(3),
        "v": torch.zeros(3, 4, 2),
    }
    if "v" in change:
        arguments["x"] = torch.zeros(3, 5, 4)
    with pytest.raises(ValueError, match=message):
        cin_fast.cci(**{**arguments, **change})


def test_a_batch_of_partners_is_named():
    x, partner, eta = torch.zeros(2, 4, 5), torch.tensor([[1, 0], [0, 1]]), torch.zeros(2)
    with pytest.raises(ValueError, match="partner: expected one for all"):
        torch.func.vmap(lambda partner: cin_fast.cci(x, partner, eta))(partner)


def test_forward_mode_uses_the_definition():
    x = make_input("diffuse", (2, 4, 3), torch.float64)
    partner, eta = torch.tensor([1, 0]), torch.tensor([0.3, 0.6], dtype=torch.float64)

    def of(x, eta):
        return cin_fast.cci(x, partner, eta)

    tangents = make_input("randn", x.shape, x.dtype, seed=1), torch.tensor([1.0, -2.0]).double()
    ahead, behind = (
        of(x + sign * 1e-6 * tangents[0], eta + sign * 1e-6 * tangents[1]) for sign in (1, -1)
    )
    _, found = torch.func.jvp(of, (x, eta), tangents)
    torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


def test_without_data_there_are_shapes():
    partner = torch.tensor([1, 0])
    x, eta = torch.empty(2, 5, 4, device="meta"), torch.empty(2, device="meta")
    assert cin_fast.cci(x, partner, eta).shape == x.shape
    assert cin_fast.cci(x, partner.to("meta"), eta).shape == x.shape
    with FakeTensorMode():
        fake = torch.empty(2, 5, 4)
        assert cin_fast.cci(fake, torch.tensor([1, 0]), torch.empty(2)).shape == fake.shape
