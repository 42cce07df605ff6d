"""What a model costs in inference: parameters, floating-point operations, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cin_fast import thin
from cin_fast.dispatch import BACKENDS

_Shape = Sequence[int]


def sci_flops(x_BCL: _Shape, v_BCK: _Shape | None = None) -> int:
    """Multiplications and additions of the two products of ``softmax(scale * x x^T) v``."""
    batch, channels, positions = x_BCL
    columns = positions if v_BCK is None else v_BCK[2]
    return 2 * batch * channels**2 * (positions + columns)


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def model_flops(model: nn.Module, image_size: int, device: torch.device) -> int:
    """Floating-point operations of one image's inference: two for a multiply-add."""
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    ours: dict[Any, Any] = dict.fromkeys(_sci_operators(), _count_sci)
    ours[thin.OPERATOR] = _count_thin_linear
    # The counter knows the products that attention is made of, not every fused form of it.
    with (
        FlopCounterMode(display=False, custom_mapping=ours) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        model.eval()(image)
    return counter.get_total_flops()


@torch.inference_mode()
def milliseconds_per_image(
    models: Mapping[str, nn.Module],
    image_size: int,
    device: torch.device,
    *,
    batch: int = 8,
    rounds: int = 9,
) -> dict[str, float]:
    """Median time of an image's inference for each model.

    Rounds are interleaved between the models, so that a machine that drifts favours none.
    """
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()(images)
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(_milliseconds(model, images) / batch)
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(model: nn.Module, images: Tensor) -> float:
    _wait(images.device)
    start = time.perf_counter()
    model(images)
    _wait(images.device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sci_operators() -> Iterator[Any]:
    for backend in BACKENDS:
        for stem in ("sci", "sci_values"):
            if hasattr(torch.ops.cin_fast, f"{backend}_{stem}"):
                yield getattr(torch.ops.cin_fast, f"{backend}_{stem}")


def _count_sci(x: _Shape, v: _Shape | None, *_: Any, **__: Any) -> int:
    return sci_flops(x, v)


def _count_thin_linear(a: _Shape, w: _Shape, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * w[0]
