"""What torch's counter says of the operators: the products of the definition."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cin_fast
from cin_fast import dispatch
from cin_fast import flops as flops
from cin_fast.nn import CCI, SCI

B, C, H, W, K = 2, 8, 5, 6, 9


def counted(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


def eager(x, v):
    return torch.softmax(-x @ x.mT, -1) @ v


@pytest.fixture
def x():
    return torch.rand(B, C, H * W, requires_grad=True)


@pytest.mark.parametrize("backend", ["reference", "matmul", "cpu"])
@pytest.mark.parametrize("columns", [None, K])
def test_as_much_as_eager(backend, columns, x):
    if dispatch.unavailable(backend):
        pytest.skip(dispatch.unavailable(backend))
    v = None if columns is None else torch.rand(B, C, columns, requires_grad=True)
    partner, eta = torch.tensor([1, 0]), torch.ones(B)
    _, expected = counted(lambda: eager(x, x if v is None else v))
    for call in (
        lambda: cin_fast.sci(x, v, backend=backend),
        lambda: cin_fast.cci(x, partner, eta, v, backend=backend),
    ):
        y, forward = counted(call)
        assert forward == expected
        with torch.no_grad():
            assert counted(call)[1] == expected
        _, backward = counted(y.sum().backward)
        _, gradient = counted(eager(x, x if v is None else v).sum().backward)
        # Kernels make x x^T again; the definition, which can be differentiated again, does not.
        again = 0 if backend == "reference" else 2 * B * C * C * H * W
        assert backward == gradient + again


def test_the_pooled_pair(x):
    if dispatch.unavailable("cpu"):
        pytest.skip(dispatch.unavailable("cpu"))
    sci = SCI(C)
    cci, maps = CCI(C, phi=sci.phi), x.unflatten(-1, (H, W))
    pair, forward = counted(lambda: cci.pooled_pair(maps, torch.tensor([1, 0])))
    columns, phi = 2 * B * C * C * (H * W + K), 2 * (2 * B) * (K * C) * C
    assert forward == 2 * columns + phi
    _, backward = counted((pair.z_BC + pair.z_pair_BC).sum().backward)
    assert backward == 2 * 2 * B * C * C * (3 * H * W + 2 * K) + 2 * phi
