"""Large memory of the cpu backend: kept from call to call, never shared, given back when asked."""

from __future__ import annotations

import pytest
import torch
from cpu_isas import poisoned_memory

import cin_fast
import cin_fast.thin

OPS = torch.ops.cin_fast
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept(cpu_extension: str) -> None:
    cin_fast.empty_cache()


def gradient(rows: int, columns: int) -> torch.Tensor:
    """All ones, a float each, in memory that is kept when it is dropped."""
    return OPS.cpu_thin_linear_weight(torch.ones(1, rows), torch.ones(1, columns))


def test_dropped_memory_is_used_again_and_living_memory_never() -> None:
    a, dy = torch.randn(2, 2048), torch.randn(2, 1024)
    first = OPS.cpu_thin_linear_weight(dy, a)
    kept = first.clone()
    second = OPS.cpu_thin_linear_weight(2 * dy, a)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    torch.testing.assert_close(second, 2 * kept)
    dropped = first.data_ptr()
    del first
    third = OPS.cpu_thin_linear_weight(-dy, a)
    assert third.data_ptr() == dropped != second.data_ptr()
    torch.testing.assert_close(third, -kept)
    del second, third
    larger = OPS.cpu_thin_linear_weight(dy, torch.cat([a, a], dim=1))
    torch.testing.assert_close(larger, torch.cat([kept, kept], dim=1))


def test_scratch_of_one_call_serves_the_next() -> None:
    x = torch.relu(torch.randn(2, 256, 2000))
    y = cin_fast.sci(x, backend="cpu")
    held = cin_fast.empty_cache()
    # Packed x and v and the sums, of as many images as there are threads.
    assert held >= 3 * 4 * 256 * 2000
    assert cin_fast.empty_cache() == 0
    for _ in range(3):
        assert torch.equal(cin_fast.sci(x, backend="cpu"), y)
    assert cin_fast.empty_cache() == held


def test_what_an_earlier_call_left_is_in_no_result() -> None:
    x = torch.relu(torch.randn(1, 256, 2000)).requires_grad_()
    dy = torch.randn(1, 256, 2000)
    y = cin_fast.sci(x, backend="cpu")
    (dx,) = torch.autograd.grad(y, x, dy)
    gradient(2000, 2000)
    again = cin_fast.sci(x, backend="cpu")
    with poisoned_memory():
        assert gradient(2000, 2000).isfinite().all()
        poisoned = cin_fast.sci(x, backend="cpu")
        (poisoned_dx,) = torch.autograd.grad(poisoned, x, dy)
    assert torch.equal(again, y)
    assert torch.equal(poisoned, y)
    assert torch.equal(poisoned_dx, dx)


def test_not_more_than_half_a_gibibyte_is_kept() -> None:
    living = [gradient(48, MIB) for _ in range(3)]
    assert cin_fast.empty_cache() == 0
    assert all(bool((one == 1).all()) for one in living)
    living.clear()
    # 192 MiB each, and the one dropped first went.
    assert cin_fast.empty_cache() == 2 * 192 * MIB


def test_small_memory_is_left_to_torch() -> None:
    cin_fast.sci(torch.randn(1, 16, 49), backend="cpu")
    assert cin_fast.empty_cache() == 0


def test_nothing_is_kept_where_the_backend_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cin_fast.dispatch, "unavailable", lambda backend: "off")
    assert cin_fast.empty_cache() == 0
