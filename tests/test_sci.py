"""sci: its value, its gradients, its arguments, and what torch does with the operator."""

import pytest
import torch
from torch.autograd import forward_ad

import cin_fast
from cin_fast.testing import INPUT_KINDS, SHAPES, check_sci, make_input


def by_loops(x_BCL, scale):
    """Eq. 1 and 2 with nothing but scalars."""
    b, c, _ = x_BCL.shape
    y = torch.zeros_like(x_BCL)
    for n in range(b):
        for i in range(c):
            logits = [scale * float(x_BCL[n, i] @ x_BCL[n, j]) for j in range(c)]
            top = max(logits)
            weights = [2.718281828459045 ** (logit - top) for logit in logits]
            for j in range(c):
                y[n, i] += weights[j] / sum(weights) * x_BCL[n, j]
    return y


@pytest.mark.parametrize("scale", [-1.0, 1.0, -0.3])
def test_value_is_the_papers_equation(scale):
    x = make_input("diffuse", (2, 5, 3), torch.float64)
    torch.testing.assert_close(
        cin_fast.sci(x, scale=scale), by_loops(x, scale), rtol=1e-12, atol=1e-12
    )


def test_a_hand_computed_pair_of_channels():
    # x x^T = [[1, 0], [0, 4]]; row 0 of W is softmax(-1, 0), row 1 is softmax(0, -4).
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    a, b = 1 / (1 + torch.e), 1 / (1 + torch.e**-4)
    expected = torch.tensor([[[a, 2 * (1 - a)], [b, 2 * (1 - b)]]], dtype=torch.float64)
    torch.testing.assert_close(cin_fast.sci(x), expected)


def test_the_complementary_channel_gets_the_largest_weight():
    x = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]]])
    assert cin_fast.sci_weights(x)[0, 0].argmax() == 2
    assert cin_fast.sci_weights(x, scale=1.0)[0, 0].argmax() != 2


def test_it_is_danets_channel_attention():
    x = make_input("relu", (2, 9, 16), torch.float64)
    energy = x @ x.mT
    attention = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1)
    torch.testing.assert_close(cin_fast.sci(x), attention @ x)


def test_logits_are_not_divided_by_the_number_of_positions():
    x = make_input("diffuse", (1, 6, 8), torch.float64)
    torch.testing.assert_close(
        cin_fast.sci_weights(x.repeat(1, 1, 4)), cin_fast.sci_weights(2 * x), rtol=1e-9, atol=1e-9
    )


def test_maps_keep_their_shape_and_v_gives_the_result_its_own():
    x = make_input("relu", (2, 6, 20))
    map_x = x.unflatten(-1, (4, 5))
    torch.testing.assert_close(cin_fast.sci(map_x), cin_fast.sci(x).unflatten(-1, (4, 5)))
    assert cin_fast.sci(x, x[..., :7]).shape == (2, 6, 7)
    assert cin_fast.sci(x, map_x[..., :2]).shape == (2, 6, 4, 2)


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_keeps_the_rule(kind, dtype):
    for shape in SHAPES:
        x = make_input(kind, shape, dtype)
        check_sci("reference", x, None, make_input("randn", shape, dtype, seed=1))


def test_non_contiguous_inputs_give_the_same():
    x = make_input("relu", (2, 7, 12)).requires_grad_()
    strided = torch.empty(2, 12, 7).mT.copy_(x.detach()).requires_grad_()
    assert not strided.is_contiguous()
    for leaf in (x, strided):
        cin_fast.sci(leaf).square().sum().backward()
    torch.testing.assert_close(strided.grad, x.grad)


def test_gradients_to_second_order():
    x = make_input("diffuse", (2, 4, 3), torch.float64).requires_grad_()
    v = make_input("randn", (2, 4, 2), torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(cin_fast.sci, (x,))
    assert torch.autograd.gradcheck(cin_fast.sci, (x, v))
    assert torch.autograd.gradgradcheck(cin_fast.sci, (x, v))


@pytest.mark.parametrize("with_v", [False, True])
def test_opcheck(with_v):
    x = make_input("relu", (2, 5, 6)).requires_grad_()
    v = make_input("randn", (2, 5, 3)).requires_grad_() if with_v else None
    torch.library.opcheck(torch.ops.cin_fast.reference_sci, (x, v, -1.0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    x = make_input("relu", (2, 5, 6)).requires_grad_()
    compiled = torch.compile(
        lambda x: cin_fast.sci(x, backend="reference").square(), fullgraph=True, dynamic=dynamic
    )
    (expected,) = torch.autograd.grad(cin_fast.sci(x, backend="reference").square().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(actual, expected)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, x):
            return cin_fast.sci(x, backend="reference")

    x = make_input("relu", (2, 5, 6))
    program = torch.export.export(Module(), (x,))
    torch.testing.assert_close(program.module()(x), cin_fast.sci(x, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_call_on_cast_inputs(dtype):
    x = make_input("relu", (2, 6, 9)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = cin_fast.sci(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, cin_fast.sci(x.to(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_leaves_the_logits_alone():
    x = 3 * make_input("randn", (1, 6, 50))
    expected = cin_fast.sci_weights(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cin_fast.sci_weights(x), expected)


def test_large_activations_do_not_overflow():
    x = torch.full((1, 3, 8), 100.0, dtype=torch.float16)
    torch.testing.assert_close(cin_fast.sci(x), x)
    x = make_input("randn", (1, 6, 20)) * 1e4
    assert cin_fast.sci(x).isfinite().all()


def test_same_bits_at_every_run():
    x = make_input("randn", (2, 33, 49))
    assert torch.equal(cin_fast.sci(x), cin_fast.sci(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4),), r"x: expected \(B, C, L\).*\(3, 4\)"),
        ((torch.zeros(2, 3, 4, dtype=torch.int64),), "x: expected float32.*int64"),
        ((torch.zeros(2, 0, 4),), r"x: channels .* \(2, 0, 4\)"),
        ((torch.zeros(2, 3, 0),), "x: channels and positions may not be empty"),
        (("nothing",), "x: expected a tensor, found str"),
        ((torch.zeros(2, 3, 4).to_sparse(),), "x: expected a dense tensor.*sparse"),
        ((torch.nested.nested_tensor([torch.zeros(3, 4)]),), "x: expected one shape.*nested"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)), r"v: expected \(2, 3, K\)"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).double()), "v: expected x's dtype"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, device="meta")), "v: expected x's device"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 0)), "v: columns may not be empty"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cin_fast.sci(*arguments)


def test_forward_mode_and_func_transforms_use_the_definition():
    x = make_input("diffuse", (2, 4, 3), torch.float64)
    tangent = make_input("randn", (2, 4, 3), torch.float64, seed=1)
    step = 1e-6 * tangent
    numeric = (cin_fast.sci(x + step) - cin_fast.sci(x - step)) / 2e-6
    _, by_func = torch.func.jvp(cin_fast.sci, (x,), (tangent,))
    torch.testing.assert_close(by_func, numeric, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found = forward_ad.unpack_dual(cin_fast.sci(dual)).tangent
        torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-8)
        # Registered operators would drop the tangent in silence.
        with pytest.raises(ValueError, match="backend: 'cpu' cannot run under forward-mode AD"):
            cin_fast.sci(dual, backend="cpu")
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(cin_fast.sci(leaf).square().sum(), leaf)
    actual = torch.func.grad(lambda x: cin_fast.sci(x).square().sum())(x)
    torch.testing.assert_close(actual, expected)
    mapped = torch.func.vmap(cin_fast.sci)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(mapped[1], cin_fast.sci(2 * x))


def _tangent_of(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize(
    "of",
    [
        lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
        lambda f, x: _tangent_of(f, x, x),
        lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    ],
    ids=["jvp", "dual", "grad", "vmap"],
)
@pytest.mark.parametrize("function", [cin_fast.sci, cin_fast.tap_means])
def test_transforms_keep_their_values_when_compiled(function, of):
    torch.compiler.reset()
    x = make_input("diffuse", (2, 4, 3, 2))
    compiled = torch.compile(lambda x: of(function, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), of(function, x))


def test_a_compiled_call_keeps_the_tangent_of_its_caller():
    torch.compiler.reset()
    compiled = torch.compile(cin_fast.sci, backend="aot_eager")
    x = make_input("diffuse", (2, 4, 3))
    compiled(x)
    for of in (lambda f: torch.func.jvp(f, (x,), (x,))[1], lambda f: _tangent_of(f, x, x)):
        torch.testing.assert_close(of(compiled), of(cin_fast.sci))


def test_tap_means_in_forward_mode():
    x = make_input("randn", (1, 2, 3, 4), torch.float64)
    _, tangent = torch.func.jvp(cin_fast.tap_means, (x,), (x,))
    torch.testing.assert_close(tangent, cin_fast.tap_means(x))


def test_without_data_there_are_shapes():
    x = torch.empty(2, 5, 3, 4, device="meta", requires_grad=True)
    y = cin_fast.sci(x)
    assert (y.shape, y.device.type) == (x.shape, "meta")
    assert cin_fast.sci_weights(x).shape == (2, 5, 5)
    assert cin_fast.tap_means(x).shape == (2, 5, 9)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("scale", "found"),
    [
        ("negative", "a number, found 'negative'"),
        (float("nan"), "a finite number, found nan"),
        # Its gradient would be dropped in silence.
        (torch.ones((), requires_grad=True), "a number, found a tensor that asks for a gradient"),
    ],
)
def test_a_scale_that_is_no_number_is_named(scale, found):
    with pytest.raises(ValueError, match=f"scale: expected {found}"):
        cin_fast.sci(torch.zeros(1, 2, 3), scale=scale)


def test_a_compiled_scale_may_change():
    compiled = torch.compile(
        lambda x, scale: cin_fast.sci(x, scale=scale), backend="aot_eager", fullgraph=True
    )
    x = make_input("diffuse", (1, 4, 3))
    for scale in (-1.0, -0.5, 2.25):
        torch.testing.assert_close(compiled(x, scale), cin_fast.sci(x, scale=scale))


@pytest.mark.parametrize("wide", [0, 1])
def test_autocast_does_not_mix_float64(wide):
    x, v = (torch.zeros(1, 2, 3, dtype=(torch.float32, torch.float64)[n == wide]) for n in (0, 1))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="v: expected x's dtype"),
    ):
        cin_fast.sci(x, v)


@pytest.mark.parametrize("backend", ["reference", "matmul"])
def test_a_result_that_no_gradient_needs_may_be_changed(backend):
    x = make_input("diffuse", (2, 6, 5)).requires_grad_()
    y = cin_fast.sci(x, backend=backend)
    dy = (y > 0).float()
    (expected,) = torch.autograd.grad(cin_fast.sci(x), x, dy)
    y.relu_()
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 5, 3).to_sparse()}, "v: expected a dense tensor"),
        ({"scale": 10**400}, "scale: expected a number"),
        ({"scale": "-1"}, "scale: expected a number"),
        ({"scale": torch.ones((), device="meta")}, "scale: expected a number"),
    ],
)
def test_what_is_no_tensor_or_number_for_it_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        cin_fast.sci(torch.zeros(2, 5, 4), **change)
