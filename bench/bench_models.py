"""Whole models: inference (the paper's Table 1, column "Time") and a training step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import pytest
import torch
from bench_pair_head import Heads
from bench_pair_head import eager as eager_pair_head
from cases import DEVICE, QUICK
from compare import Entry, LeftOut, Work
from rivals import eager_head
from torch import Tensor

from cin_fast.cost import model_flops, parameters
from cin_fast.models import CIN, Classifier, build_model

# Method and backbone of each row. "dense" runs CIN's maps and convolution in full through our
# operators; "naive" is the head as other projects write it; "compiled" is that under torch.compile.
SYSTEMS = {
    "vgg19": ("plain", "vgg19"),
    "resnet50": ("plain", "resnet50"),
    "resnet101": ("plain", "resnet101"),
    "resnet50-sci": ("sci", "resnet50"),
    "resnet50-cin": ("cin", "resnet50"),
    "resnet50-cin-dense": ("cin", "resnet50"),
    "resnet50-cin-naive": ("cin", "resnet50"),
    "resnet50-cin-compiled": ("cin", "resnet50"),
    "resnet101-cin": ("cin", "resnet101"),
}
TRAINED = (
    "resnet50",
    "resnet50-cin",
    "resnet50-cin-dense",
    "resnet50-cin-naive",
    "resnet50-cin-compiled",
)
if QUICK:
    SYSTEMS = {
        "resnet18": ("plain", "resnet18"),
        "resnet18-cin": ("cin", "resnet18"),
        "resnet18-cin-naive": ("cin", "resnet18"),
    }
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


class NaiveCIN(CIN):
    """CIN whose heads are bmm, softmax, bmm, convolution, mean."""

    def features(self, x_BCHW: Tensor) -> Tensor:
        return eager_head(x_BCHW, self.sci.phi.weight, self.sci.phi.bias)

    def pair_features(self, x_BCHW: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        return eager_pair_head(Heads(self.sci, self.cci), x_BCHW, partner)


@cache
def make_model(name: str) -> Classifier:
    """The same weights for every form of a system."""
    method, backbone = SYSTEMS[name]
    torch.manual_seed(0)
    if name.endswith(("naive", "compiled")):
        model: Classifier = NaiveCIN(_CLASSES, backbone)
    else:
        model = build_model(method, _CLASSES, backbone, pooled=not name.endswith("dense"))
    return model.to(DEVICE)


@torch.inference_mode()
def infer(model: Classifier, images: Tensor) -> Tensor:
    """Logits."""
    return model(images)


def loss_and_gradients(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Both terms of Eq. 9; gradients stay with the parameters."""
    partner = torch.arange(len(images)) ^ 1 if model.uses_pairs else None
    loss = model.loss(model(images, partner), labels, partner, margin=0.5).total(2.0)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


def train_step(
    model: Classifier, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    """A whole step of training, the optimiser's included."""
    loss_and_gradients(model.train(), images, labels)
    optimizer.step()


def prepare(case: ModelCase, name: str) -> Entry:
    """A system with its images."""
    if name.endswith("compiled") and DEVICE.type == "cpu":
        raise LeftOut("on a CPU, compiling a whole network takes longer than this group's rounds")
    images = torch.randn(case.batch, 3, case.size, case.size, device=DEVICE)
    model = make_model(name)
    called = torch.compile(model, dynamic=False) if name.endswith("compiled") else model
    if not case.training:
        return Entry(lambda: infer(called.eval(), images), partial(check_logits, name, images))
    labels = torch.arange(case.batch, device=DEVICE) // 2
    # A step of length 0 costs what any step costs, and leaves all systems their weights.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=0.9, weight_decay=2e-4, fused=True
    )
    return Entry(
        lambda: train_step(called, optimizer, images, labels),
        partial(check_gradients, name, images, labels),
    )


def check_logits(name: str, images: Tensor) -> None:
    """Within 1e-4 of the dense form through plain PyTorch in float64."""
    images = images[:1]
    found = infer(make_model(name).eval(), images)
    exact = infer(_judge(*SYSTEMS[name]), images.double())
    assert _distance(found, exact) < 1e-4, f"logits differ by {_distance(found, exact):.1e}"


def check_gradients(name: str, images: Tensor, labels: Tensor) -> None:
    """The loss of a pair as the logits; gradients at most twice as far off as plain PyTorch's.

    A whole network in float32 is no judge of 1e-3: signs of |M| and of ReLU hang on rounding. In
    evaluation mode, where no image's statistics touch another's.
    """
    images, labels = images[:2], labels[:2]
    model, judge = make_model(name).eval(), _judge(*SYSTEMS[name])
    found = loss_and_gradients(model, images, labels)
    exact = loss_and_gradients(judge, images.double(), labels)
    assert _distance(found, exact) < 1e-4, f"the loss differs by {_distance(found, exact):.1e}"
    plain = copy.deepcopy(judge).float()
    loss_and_gradients(plain, images, labels)
    error, torch_error = (_distance(_gradients(m), _gradients(judge)) for m in (model, plain))
    assert error <= 2 * torch_error + torch.finfo(torch.float32).eps, (
        f"gradients differ by {error:.1e} of their norm, plain PyTorch's by {torch_error:.1e}"
    )


def _distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def _gradients(model: Classifier) -> Tensor:
    found = dict(model.named_parameters())
    return torch.cat([p.grad.flatten() for p in found.values() if p.grad is not None])


@lru_cache(maxsize=1)
def _judge(method: str, backbone: str) -> Classifier:
    (name, *_) = (name for name, system in SYSTEMS.items() if system == (method, backbone))
    judge = build_model(method, _CLASSES, backbone, pooled=False, backend="reference")
    judge.load_state_dict(make_model(name).state_dict())
    return judge.double().to(DEVICE).eval()


def work(case: ModelCase, name: str) -> Work:
    """Operations of the backbone and head; bytes of the weights, read at least once."""
    method, backbone = SYSTEMS[name]
    model = make_model(f"{backbone}-{method}" if method != "plain" else backbone)
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
    """Forward, backward and SGD with momentum."""
    versus(rival, partial(prepare, case), work(case, rival))
