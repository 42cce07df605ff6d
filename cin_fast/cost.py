"""What a model costs in inference: parameters, floating-point operations, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Has the operators counted.
from cin_fast import flops as flops


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def model_flops(model: nn.Module, image_size: int, device: torch.device) -> int:
    """Floating-point operations of one image's inference: two for a multiply-add."""
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    # The counter knows the products that attention is made of, not every fused form of it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
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
