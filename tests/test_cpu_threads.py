"""Threads of the C++ kernels: more than one works, and how many leaves no more than rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import cin_fast
from cin_fast.testing import make_input, make_pairs

pytestmark = pytest.mark.usefixtures("cpu_extension")


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def values_and_gradients(x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    partner, eta = make_pairs(len(x))
    y, y_pair = cin_fast.sci(x), cin_fast.cci(x, partner, eta)
    dy = make_input("randn", x.shape, x.dtype, seed=5)
    return [y, y_pair, *torch.autograd.grad(y, x, dy), *torch.autograd.grad(y_pair, x, dy)]


@pytest.mark.parametrize("shape", [(1, 300, 49), (4, 130, 20), (2, 5, 3)])
def test_the_number_of_threads_leaves_only_rounding(shape: tuple[int, ...]) -> None:
    x = make_input("relu", shape)
    torch.set_num_threads(1)
    expected = values_and_gradients(x)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        first = values_and_gradients(x)
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
        for again, once in zip(values_and_gradients(x), first, strict=True):
            assert torch.equal(again, once)


def test_calls_from_several_threads_at_once() -> None:
    inputs = [make_input("relu", (2, 140, 30), seed=seed) for seed in range(8)]
    expected = [cin_fast.sci(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for actual, once in zip(pool.map(cin_fast.sci, inputs), expected, strict=True):
            torch.testing.assert_close(actual, once, rtol=1e-5, atol=1e-5)


# Waiting threads sleep (PASSIVE), so that time spent outside the main thread is work. Tasks go to
# who is free: in one call, a thread that a busy machine wakes late finds few left.
SHARE = """
import time, torch, cin_fast
torch.set_num_threads(2)
x = torch.relu(torch.randn({batch}, 1024, 49)).requires_grad_()
cin_fast.sci(x[:, :2], backend="cpu")
process, thread = time.process_time(), time.thread_time()
for _ in range(20):
    cin_fast.sci(x, backend="cpu")
total, own = time.process_time() - process, time.thread_time() - thread
print((total - own) / total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is asked for on Linux alone")
@pytest.mark.skipif(os.cpu_count() == 1, reason="one processor")
@pytest.mark.parametrize("batch", [1, 6])
def test_one_image_and_a_batch_use_two_threads(batch: int) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    environment.pop("OMP_NUM_THREADS", None)
    run = subprocess.run(
        [sys.executable, "-c", SHARE.format(batch=batch)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert float(run.stdout) > 0.05
