"""SCI, CCI and ChannelAttention as modules: dense and pooled form are equal, in any network."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import cin_fast
from cin_fast.nn import CCI, SCI, ChannelAttention, mean_of_conv
from cin_fast.reference import tap_rectangles
from cin_fast.testing import make_input, make_pairs

MAPS = [(14, 14), (7, 7), (1, 1), (5, 9), (1, 6), (4, 1), (2, 2)]


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def make_map(height, width, channels=6, batch=4, dtype=torch.float32):
    return make_input("relu", (batch, channels, height, width), dtype)


@pytest.mark.parametrize(("height", "width"), MAPS)
def test_mean_of_conv_is_the_mean_of_the_convolution(height, width):
    x = make_map(height, width, dtype=torch.float64) + 1
    phi = nn.Conv2d(6, 5, 3, padding=1).double()
    torch.testing.assert_close(
        mean_of_conv(phi, cin_fast.tap_means(x)), phi(x).mean(dim=(2, 3)), rtol=1e-12, atol=1e-12
    )


def test_tap_means_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    # Weight [0, 0] reads up and to the left: it never sees the last row or column.
    expected = torch.tensor([[[1.0, 3, 2, 5, 15, 10, 4, 12, 8]]]) / 4
    torch.testing.assert_close(cin_fast.tap_means(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("height", "width"), MAPS)
def test_tap_means_against_float64(dtype, height, width):
    x = make_map(height, width, dtype=dtype).requires_grad_()
    v = cin_fast.tap_means(x)
    u = tap_rectangles(height, width, device=x.device, dtype=torch.float64)
    exact = x.detach().double().flatten(2) @ u
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(v.double(), exact, **rounding)
    dv = make_input("randn", v.shape, dtype)
    (dx,) = torch.autograd.grad(v, x, dv)
    exact_dx = (dv.double() @ u.mT).unflatten(-1, (height, width))
    torch.testing.assert_close(dx.double(), exact_dx, **rounding)


def test_tap_means_opcheck():
    x = make_map(3, 4).requires_grad_()
    torch.library.opcheck(torch.ops.cin_fast.reference_tap_means, (x,))
    torch.library.opcheck(torch.ops.cin_fast.cpu_tap_means, (x,))


@pytest.mark.parametrize("where", ["argument", "environment", "module"])
def test_tap_means_of_the_reference_are_the_definition(where, cpu_extension, monkeypatch):
    x, module = make_map(3, 4), SCI(6, backend="reference" if where == "module" else None)
    if where == "environment":
        monkeypatch.setenv("CIN_FAST_BACKEND", "reference")
    with torch.profiler.profile() as profile:
        if where == "argument":
            cin_fast.tap_means(x, backend="reference")
        else:
            module.pooled(x)
    names = {event.name for event in profile.events() if "tap_means" in event.name}
    assert names == {"cin_fast::reference_tap_means"}


def test_tap_means_has_every_derivative():
    x = make_map(3, 4, batch=2, dtype=torch.float64).requires_grad_()
    torch.autograd.gradgradcheck(cin_fast.tap_means, x)
    # The cpu backend takes no float64.
    x = x.detach().float().requires_grad_()
    (dx,) = torch.autograd.grad(cin_fast.tap_means(x).square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    twice = cin_fast.tap_means(dx.detach() * 2)
    u = tap_rectangles(3, 4, device=x.device, dtype=x.dtype)
    torch.testing.assert_close(found, (2 * twice @ u.mT).unflatten(-1, (3, 4)))


def test_modules_on_the_reference_have_a_second_derivative():
    module, partner = CCI(6, backend="reference"), torch.tensor([1, 0, 3, 2])
    x = make_map(3, 4).requires_grad_()
    z, z_pair = module.pooled_pair(x, partner)
    (dx,) = torch.autograd.grad((z * z_pair).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert second.isfinite().all()


def test_tap_means_of_an_empty_batch():
    assert cin_fast.tap_means(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 9)


def pooled_and_dense(module, dense_mean, pooled, x, *more):
    """Values and every gradient of both forms under one random upstream gradient."""
    upstream = make_input("randn", x.shape[:2], x.dtype, seed=3)
    found = []
    for form in (dense_mean, pooled):
        leaf = x.detach().requires_grad_()
        value = form(leaf, *more)
        leaves = [leaf, *module.parameters()]
        found.append([value, *torch.autograd.grad(value, leaves, upstream)])
    return zip(*found, strict=True)


@pytest.mark.parametrize(("height", "width"), MAPS)
def test_sci_dense_and_pooled_are_equal(height, width):
    module = SCI(6)
    x = make_map(height, width)
    for dense, pooled in pooled_and_dense(
        module, lambda x: module(x).mean(dim=(2, 3)), lambda x: module.pooled(x).z_BC, x
    ):
        assert relative(pooled, dense) < 1e-5


@pytest.mark.parametrize(("height", "width"), MAPS)
def test_cci_dense_and_pooled_are_equal(height, width):
    module = CCI(6)
    x, partner = make_map(height, width), torch.tensor([2, 1, 0, 3])
    for dense, pooled in pooled_and_dense(
        module,
        lambda x: module(x, partner).mean(dim=(2, 3)),
        lambda x: module.pooled(x, partner),
        x,
    ):
        assert relative(pooled, dense) < 1e-5


def test_sci_is_equation_3():
    module, x = SCI(6).double(), make_map(4, 5, dtype=torch.float64)
    y = torch.softmax(-x.flatten(2) @ x.flatten(2).mT, -1) @ x.flatten(2)
    torch.testing.assert_close(module(x), module.phi(y.view_as(x)) + x)


@pytest.mark.parametrize("batch", [4, 3, 0])
def test_pooled_pair_is_both_pooled_forms(batch):
    sci = SCI(6)
    cci = CCI(6, phi=sci.phi)
    partner, _ = make_pairs(batch)
    found = []
    for joint in (True, False):
        x = make_map(5, 9, batch=batch).requires_grad_()
        means = sci.pooled(x)
        z, z_pair = (
            cci.pooled_pair(x, partner) if joint else (means.z_BC, cci.pooled(x, partner, means))
        )
        total = (z * make_input("randn", z.shape)).sum() + z_pair.square().sum()
        found.append([z, z_pair, *torch.autograd.grad(total, [x, *cci.parameters()])])
    for joint, alone in zip(*found, strict=True):
        torch.testing.assert_close(joint, alone, rtol=1e-5, atol=1e-6)


def test_sci_pooled_returns_the_means_of_y():
    module, x = SCI(6), make_map(4, 5)
    torch.testing.assert_close(module.pooled(x).y_BC, cin_fast.sci(x).mean(dim=(2, 3)))


def test_eta_reads_the_pair_in_order():
    """eta = psi([Y_A, Y_B]) and gamma = psi([Y_B, Y_A]): one psi for both directions."""
    module = CCI(3)
    y = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        module.psi.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0, 10]]))
        module.psi.bias.fill_(0.5)
    expected = torch.tensor([1 + 60 + 0.5, 4 + 30 + 0.5])
    torch.testing.assert_close(module.eta(y, torch.tensor([1, 0])), expected)


def test_autocast_leaves_eta_alone():
    """As in pooled_pair: eta decides signs, and psi costs nothing."""
    module, y, partner = CCI(3), torch.randn(2, 3), torch.tensor([1, 0])
    expected = module.eta(y, partner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.eta(y, partner), expected)


def test_eta_is_made_from_y_and_not_from_phi_of_y():
    module, x = CCI(6), make_map(4, 5)
    partner = torch.tensor([1, 0, 3, 2])
    y = cin_fast.sci(x).mean(dim=(2, 3))
    eta = module.eta(y, partner)
    expected = module.phi(cin_fast.cci(x, partner, eta)) + x
    torch.testing.assert_close(module(x, partner), expected)


def test_cci_accepts_what_sci_has_computed():
    sci, x = SCI(6), make_map(4, 5)
    cci, partner = CCI(6, phi=sci.phi), torch.tensor([1, 0, 3, 2])
    means = sci.pooled(x)
    torch.testing.assert_close(cci.pooled(x, partner, means), cci.pooled(x, partner))
    torch.testing.assert_close(cci(x, partner, means.y_BC), cci(x, partner))


@pytest.mark.parametrize("strict", [False, True])
def test_a_pair_exports_for_any_batch(strict):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.cci = CCI(6)

        def forward(self, x, partner):
            return tuple(self.cci.pooled_pair(x, partner))

    module, batch = Pairs(), torch.export.Dim("batch", min=1, max=64)
    inputs = (make_map(3, 4), torch.tensor([1, 0, 3, 2]))
    shapes = ({0: batch}, {0: batch})
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    other = (make_map(3, 4, batch=6), torch.tensor([1, 0, 3, 2, 5, 4]))
    torch.testing.assert_close(program.module()(*other), module(*other))


def test_channel_attention_is_danets():
    class CamModule(nn.Module):
        """DANet's own arithmetic."""

        def __init__(self, in_dim):
            super().__init__()
            self.gamma = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            query = x.view(*x.shape[:2], -1)
            energy = query @ query.mT
            energy = energy.max(-1, keepdim=True)[0].expand_as(energy) - energy
            return self.gamma * (torch.softmax(energy, -1) @ query).view_as(x) + x

    ours, danets, x = ChannelAttention(6), CamModule(6), make_map(5, 4)
    assert torch.equal(ours(x), x)
    danets.load_state_dict(ours.state_dict())
    for module in (ours, danets):
        nn.init.constant_(module.gamma, 0.7)
    torch.testing.assert_close(ours(x), danets(x))


def test_channel_attention_takes_maps_of_its_channels_alone():
    with pytest.raises(ValueError, match="x: expected 512 channels, found 6"):
        ChannelAttention(512)(make_map(5, 4))


@pytest.mark.parametrize(
    "make_weight",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda phi: prune.l1_unstructured(phi, "weight", amount=0.5),
        lambda phi: prune.random_unstructured(phi, "bias", amount=0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_pooled_refuses_a_weight_that_a_hook_makes(make_weight):
    sci = SCI(6)
    make_weight(sci.phi)
    cci, x, partner = CCI(6, phi=sci.phi), make_map(4, 5), torch.tensor([1, 0, 3, 2])
    for call in (
        sci.pooled,
        partial(cci.pooled, partner=partner),
        partial(cci.pooled_pair, partner=partner),
    ):
        with pytest.raises(ValueError, match=r"phi: its (weight|bias) is made by a hook"):
            call(x)
    assert sci(x).isfinite().all()


def test_pooled_refuses_a_phi_that_it_is_not_the_mean_of():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Quadrupled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 4 * weight, bias)

    sci, x = SCI(6), make_map(4, 5)
    patched = nn.Conv2d(6, 6, 3, padding=1)
    patched.forward = lambda x: 2 * x
    for phi, message in (
        (Doubled(6, 6, 3, padding=1), "phi: Doubled has a forward of its own"),
        (Quadrupled(6, 6, 3, padding=1), "phi: Quadrupled has a forward of its own"),
        (patched, "phi: Conv2d has a forward of its own"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), "phi: expected Conv2d"),
        (nn.Sequential(nn.Conv2d(6, 6, 3, padding=1)), "phi: expected a Conv2d, found Sequential"),
    ):
        sci.phi = phi
        with pytest.raises(ValueError, match=message):
            sci.pooled(x)


def test_pooled_takes_a_parametrized_weight():
    sci, x = SCI(6), make_map(4, 5)
    nn.utils.parametrizations.weight_norm(sci.phi)
    torch.testing.assert_close(sci.pooled(x).z_BC, sci(x).mean((2, 3)))


def test_in_somebody_elses_network():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), ChannelAttention(), nn.ReLU(), SCI(8), nn.Flatten())
    net(torch.randn(2, 3, 9, 7)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_torch_fx_traces_the_dense_forms():
    net, x = nn.Sequential(ChannelAttention(6), SCI(6)).eval(), make_map(4, 5)
    nn.init.ones_(net[0].gamma)
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    with pytest.raises(ValueError, match="x: expected 6 channels"):
        traced(x[:, :5])


@pytest.mark.parametrize("module", [SCI(6), ChannelAttention(6)])
def test_the_memory_format_is_kept(module):
    x = make_map(4, 5).contiguous(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_scale_is_the_modules():
    x, module = make_map(3, 3), ChannelAttention(scale=1.0)
    nn.init.ones_(module.gamma)
    torch.testing.assert_close(module(x), cin_fast.sci(x, scale=1.0) + x)
    assert not torch.allclose(module(x), cin_fast.sci(x) + x)


@pytest.mark.parametrize("module", [SCI(6), ChannelAttention()])
def test_a_map_is_asked_for(module):
    with pytest.raises(ValueError, match=r"x: expected a map \(B, C, H, W\)"):
        module(torch.zeros(2, 6, 9))


def test_the_number_of_channels_is_checked():
    with pytest.raises(ValueError, match="x: expected 6 channels, found 5"):
        SCI(6)(torch.zeros(1, 5, 2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: SCI(0), "channels: expected at least 1, found 0"),
        (lambda x, p: SCI(6)("x"), "x: expected a tensor, found str"),
        (lambda x, p: CCI(6)(x, p + 9), "partner: expected an involution"),
        (lambda x, p: CCI(6).pooled(x, p[:2]), r"partner: expected shape \(4,\)"),
        (lambda x, p: CCI(6).eta(torch.zeros(4, 5), p), r"y_BC: expected \(B, 6\), found \(4, 5\)"),
        (lambda x, p: CCI(6)(x, p, torch.zeros(4, 5)), r"y_BC: .*\(4, 6\).*found \(4, 5\)"),
        (lambda x, p: CCI(6)(x, p, torch.zeros(2, 6)), r"y_BC: .*\(4, 6\).*found \(2, 6\)"),
        (
            lambda x, p: CCI(6).pooled(x, p, SCI(6).pooled(x[:2])),
            r"sci_means: .*\(4, 6\).*found \(2, 6\)",
        ),
        (lambda x, p: CCI(6, phi=nn.Linear(6, 6)), "phi: expected a Conv2d, found Linear"),
        # The pooled form of another convolution would be silently wrong.
        (
            lambda x, p: CCI(6, phi=nn.Conv2d(6, 6, 3)),
            r"phi: expected Conv2d\(6, 6, 3",
        ),
        (lambda x, p: CCI(6, phi=nn.Conv2d(5, 5, 3, padding=1)), "phi: expected"),
        (lambda x, p: CCI(6, phi=nn.Conv2d(6, 6, 3, padding=1, groups=2)), "phi: expected"),
    ],
)
def test_what_cannot_work_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_map(3, 3), torch.tensor([1, 0, 3, 2]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_shares_phi_as_its_original_does(copied):
    sci = SCI(6)
    pair = copied(nn.ModuleList([sci, CCI(6, phi=sci.phi)]))
    assert pair[0].phi is pair[1].phi
