"""The systems that the paper compares with: each core equation against loops in float64."""

import math

import pytest
import torch

from cin_fast.models import build_model
from cin_fast.models.cgnl import CompactGeneralizedNonLocal
from cin_fast.models.mamc import MAMC, OSME, n_pair_loss
from cin_fast.models.non_local import NonLocal
from cin_fast.models.se import SENet


def make_map(batch=2, channels=16, height=3, width=4, seed=0):
    shape = (batch, channels, height, width)
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def conv1x1(layer, x_CL):
    out = layer.weight[:, :, 0, 0] @ x_CL
    return out if layer.bias is None else out + layer.bias[:, None]


def test_se_reads_the_mean_of_the_gated_map():
    torch.manual_seed(0)
    model = SENet(3, "resnet18").double()
    x = make_map(channels=512)
    mean = x.mean((2, 3))
    hidden = (model.gate.squeeze.weight @ mean[1] + model.gate.squeeze.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(model.gate.excite.weight @ hidden + model.gate.excite.bias)))
    assert hidden.shape == (512 // 16,)
    torch.testing.assert_close(model.features(x)[1], (gate[:, None, None] * x[1]).mean((1, 2)))


def test_non_local_is_the_embedded_gaussian():
    torch.manual_seed(0)
    block = NonLocal(16).double().eval()
    torch.nn.init.ones_(block.norm.weight)
    x = make_map()
    with torch.no_grad():
        found = block(x)[1].flatten(1)
    x_CL = x[1].flatten(1)
    theta, phi, g = (conv1x1(layer, x_CL).detach() for layer in (block.theta, block.phi, block.g))
    y = torch.zeros_like(g)
    for i in range(x_CL.shape[1]):
        weights = torch.tensor([math.exp(theta[:, i] @ phi[:, j]) for j in range(x_CL.shape[1])])
        y[:, i] = (g * (weights / weights.sum()).double()).sum(1)
    normed = conv1x1(block.out, y) / math.sqrt(1 + block.norm.eps)
    torch.testing.assert_close(found, (normed + x_CL).detach(), rtol=1e-6, atol=1e-6)


def test_cgnl_compares_every_channel_of_every_position():
    torch.manual_seed(0)
    block = CompactGeneralizedNonLocal(16, groups=2).double()
    torch.nn.init.ones_(block.norm.weight)
    x = make_map()
    x_CL = x[1].flatten(1)
    theta, phi, g = (conv1x1(layer, x_CL) for layer in (block.theta, block.phi, block.g))
    y = []
    for group in range(2):
        channels = slice(4 * group, 4 * (group + 1))
        vec = [t[channels].flatten() for t in (theta, phi, g)]
        # The paper's form: a matrix of all channels and positions, applied to g.
        y.append((torch.outer(vec[0], vec[1]) @ vec[2]).view(4, -1))
    z = [block.out.weight[8 * i : 8 * (i + 1), :, 0, 0] @ y[i] for i in range(2)]
    z = [(part - part.mean()) / (part.var(unbiased=False) + block.norm.eps).sqrt() for part in z]
    torch.testing.assert_close(block(x)[1].flatten(1), torch.cat(z) + x_CL)


def test_cgnl_names_channels_that_cannot_be_split():
    with pytest.raises(ValueError, match="channels: expected a multiple of 16 for 8 groups, found"):
        CompactGeneralizedNonLocal(24)


@pytest.mark.parametrize("method", ["non-local", "cgnl"])
def test_a_residual_block_starts_as_the_identity(method):
    model = build_model(method, 3, "resnet18").eval()
    x = torch.randn(2, 512, 2, 3)
    assert torch.equal(model.block(x), x)


def test_osme_branches_have_gates_of_their_own():
    torch.manual_seed(0)
    osme = OSME(16, features=5).double()
    x = make_map()
    features = osme(x)
    assert features.shape == (2, 2, 5)
    mean = x.mean((2, 3))
    for p in range(2):
        expected = osme.projections[p](osme.gates[p](mean) * mean)
        torch.testing.assert_close(features[:, p], expected)
    assert (features[:, 0] - features[:, 1]).abs().max() > 1e-3


def n_pair_by_loops(features, labels):
    anchors = [(i, p) for i in range(len(labels)) for p in range(features.shape[1])]

    def kind(a, b):
        return bool(labels[a[0]] == labels[b[0]]), a[1] == b[1]

    total = 0.0
    for a in anchors:
        others = [b for b in anchors if b != a]
        sets = {(c, t): [b for b in others if kind(a, b) == (c, t)]
                for c in (True, False) for t in (True, False)}  # fmt: skip
        sasc, dasc, sadc, dadc = (
            sets[key] for key in ((True, True), (True, False), (False, True), (False, False))
        )
        for positives, negatives in ((sasc, sadc + dasc + dadc), (sadc, dadc), (dasc, dadc)):
            for positive in positives:
                inner = sum(
                    math.exp(features[a] @ features[n] - features[a] @ features[positive])
                    for n in negatives
                )
                total += math.log(1 + inner)
    return total / len(anchors)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 2, 0, 0], [0, 1], [3, 3, 3]])
def test_n_pair_loss_by_loops(labels):
    features = torch.randn(len(labels), 2, 6, generator=torch.manual_seed(1))
    features.requires_grad_()
    loss = n_pair_loss(features, torch.tensor(labels))
    assert loss.item() == pytest.approx(n_pair_by_loops(features.detach(), labels), rel=1e-5)
    loss.backward()
    assert features.grad.isfinite().all()


def test_mamc_adds_its_own_weight_in_place_of_alpha():
    model = MAMC(3, "resnet18")
    labels, partner = torch.tensor([0, 0, 1, 1]), torch.arange(4) ^ 1
    parts = model.loss(model(torch.randn(4, 3, 64, 64), partner), labels, partner, margin=0.5)
    expected = parts.classification + 0.5 * parts.pair
    torch.testing.assert_close(parts.total(alpha=2.0), expected)
    assert torch.is_tensor(model(torch.randn(1, 3, 64, 64)))
