"""Whole models: inference (the paper's Table 1, column "Time") and a training step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from cases import DEVICE, QUICK
from conftest import Entry, Work
from torch import Tensor

from cin_fast.cost import model_flops, parameters
from cin_fast.models import Classifier, build_model

# Method and backbone of each row; "dense" runs CIN's maps and convolution in full.
SYSTEMS = {
    "vgg19": ("plain", "vgg19"),
    "resnet50": ("plain", "resnet50"),
    "resnet101": ("plain", "resnet101"),
    "resnet50-sci": ("sci", "resnet50"),
    "resnet50-cin": ("cin", "resnet50"),
    "resnet50-cin-dense": ("cin", "resnet50"),
    "resnet101-cin": ("cin", "resnet101"),
}
TRAINED = ("resnet50", "resnet50-cin", "resnet50-cin-dense")
if QUICK:
    SYSTEMS = {"resnet18": ("plain", "resnet18"), "resnet18-cin": ("cin", "resnet18")}
    TRAINED = tuple(SYSTEMS)
_CLASSES = 200
# Backward costs about two forward passes.
_STEP = 3


@dataclass(frozen=True)
class ModelCase:
    """How images come."""

    name: str
    batch: int
    size: int
    training: bool

    @property
    def group(self) -> str:
        """The heading that the systems share."""
        return f"{self.name} B{self.batch} {self.size} px"

    def __str__(self) -> str:
        return self.name


def _cases() -> tuple[ModelCase, ModelCase]:
    size = 64 if QUICK else 448
    inference, step = (1, 20) if DEVICE.type == "cuda" else (1, 4)
    return (
        ModelCase("inference", inference, size, training=False),
        ModelCase("training step", step, size, training=True),
    )


INFERENCE, TRAINING = _cases()


@cache
def make_model(name: str) -> Classifier:
    """The same weights for the dense and the pooled form."""
    method, backbone = SYSTEMS[name]
    torch.manual_seed(0)
    model = build_model(method, _CLASSES, backbone, pooled=not name.endswith("dense"))
    return model.to(DEVICE)


@torch.inference_mode()
def infer(model: Classifier, images: Tensor) -> Tensor:
    """Logits."""
    return model(images)


def train_step(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Both terms of Eq. 9 and every gradient."""
    partner = torch.arange(len(images)) ^ 1 if model.uses_pairs else None
    loss = model.loss(model(images, partner), labels, partner, margin=0.5).total(2.0)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


def prepare(case: ModelCase, name: str) -> Entry:
    """A system with its images."""
    images = torch.randn(case.batch, 3, case.size, case.size, device=DEVICE)
    model = make_model(name).train(case.training)
    if case.training:
        labels = torch.arange(case.batch, device=DEVICE) // 2
        return Entry(
            lambda: train_step(model.train(), images, labels),
            partial(check_loss, model, images, labels),
        )
    return Entry(lambda: infer(model.eval(), images), partial(check_logits, model, images))


def check_logits(model: Classifier, images: Tensor) -> None:
    """Within 1e-4 of the dense form through plain PyTorch in float64."""
    found, exact = infer(model.eval(), images[:1]), infer(_judge(model), images[:1].double())
    error = ((found.double() - exact).norm() / exact.norm()).item()
    assert error < 1e-4, f"logits differ from float64 by {error:.1e}"


def check_loss(model: Classifier, images: Tensor, labels: Tensor) -> None:
    """As :func:`check_logits` for the loss, in evaluation mode, where a batch is no statistic."""
    found = train_step(model.eval(), images, labels)
    exact = train_step(_judge(model), images.double(), labels)
    error = abs((found.double() / exact).item() - 1)
    assert error < 1e-4, f"the loss differs from float64 by {error:.1e}"


def _judge(model: Classifier) -> Classifier:
    (name,) = (name for name in SYSTEMS if make_model(name) is model)
    method, backbone = SYSTEMS[name]
    judge = build_model(method, _CLASSES, backbone, pooled=False, backend="reference")
    judge.load_state_dict(model.state_dict())
    return judge.double().to(DEVICE).eval()


def work(case: ModelCase, name: str) -> Work:
    """Operations of the backbone and head; bytes of the weights, read at least once."""
    model = make_model(name)
    flops = case.batch * model_flops(model, case.size, DEVICE) * (_STEP if case.training else 1)
    return Work(flops, 4 * parameters(model))


@pytest.mark.parametrize("rival", SYSTEMS)
@pytest.mark.parametrize("case", [INFERENCE], ids=str)
def test_inference(case: ModelCase, rival: str, versus) -> None:
    """One image, as the paper times it."""
    versus(rival, partial(prepare, case), work(case, rival))


@pytest.mark.parametrize("rival", TRAINED)
@pytest.mark.parametrize("case", [TRAINING], ids=str)
def test_training_step(case: ModelCase, rival: str, versus) -> None:
    """Forward and backward; the optimiser's step is the same for all."""
    versus(rival, partial(prepare, case), work(case, rival))
