"""Whole models: inference (the paper's Table 1, column "Time") and a training step.

Before a system is timed, float64 judges all of it at a small image and its head on the map of the
timed images. At the timed size the backbone is not judged: it is the same plain PyTorch in every
system.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import pytest
import torch
from bench_pair_head import Heads
from bench_pair_head import eager as eager_pair_head
from cases import DEVICE, QUICK
from compare import Entry, LeftOut, Work
from rivals import eager_head
from torch import Tensor, nn

from cin_fast.cost import model_flops, parameters
from cin_fast.models import CIN, Classifier, build_model
from cin_fast.testing import make_input

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
# Pixels of the images that whole systems are judged at.
_SMALL = 64 if QUICK else 128
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
    def backward(self) -> bool:
        """As :class:`cases.Case` says it."""
        return self.training

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
    _settle(model.backbone)
    return model.to(DEVICE)


@torch.no_grad()
def _settle(backbone: nn.Module) -> None:
    """Running statistics of noise, which no later step changes.

    With those of a new network, features grow until rounding decides which channel is chosen.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        backbone.train()(noise(4, _SMALL).cpu())
    for norm in norms:
        norm.momentum = 0.0


@lru_cache(maxsize=2)
def noise(batch: int, size: int) -> Tensor:
    """Images."""
    return make_input("randn", (batch, 3, size, size), device=DEVICE)


@torch.inference_mode()
def infer(model: Classifier, images: Tensor) -> Tensor:
    """Logits."""
    return model(images)


def labels(batch: int) -> Tensor:
    """A class a pair."""
    return torch.arange(batch, device=DEVICE) // 2


def loss_and_gradients(model: Classifier, images: Tensor, labels_B: Tensor) -> Tensor:
    """Both terms of Eq. 9; gradients stay with the parameters."""
    partner = torch.arange(len(images)) ^ 1 if model.uses_pairs else None
    loss = model.loss(model(images, partner), labels_B, partner, margin=0.5).total(2.0)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


def train_step(
    model: Classifier, optimizer: torch.optim.Optimizer, images: Tensor, labels_B: Tensor
) -> None:
    """A whole step of training, the optimiser's included."""
    loss_and_gradients(model.train(), images, labels_B)
    optimizer.step()


def prepare(case: ModelCase, name: str) -> Entry:
    """A system with its images."""
    if name.endswith("compiled") and DEVICE.type == "cpu":
        raise LeftOut("on a CPU, compiling a whole network takes longer than this group's rounds")
    images, model = noise(case.batch, case.size), make_model(name)
    called = torch.compile(model, dynamic=False) if name.endswith("compiled") else model
    if not case.training:
        return Entry(lambda: infer(called.eval(), images), partial(check, case, name))
    # A step of length 0 costs what any step costs, and leaves all systems their weights.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=0.9, weight_decay=2e-4, fused=True
    )

    def check_and_step() -> None:
        check(case, name)
        # The first step allocates what the optimizer keeps, and is not to be measured.
        train_step(model, optimizer, noise(2, _SMALL), labels(2))

    return Entry(lambda: train_step(called, optimizer, images, labels(case.batch)), check_and_step)


@dataclass(frozen=True)
class Truth:
    """What a system makes of ``inputs`` in float64, and how far plain PyTorch is off.

    ``results`` are the logits; in training the gradients, which ``loss`` goes with.
    """

    inputs: Tensor
    loss: Tensor
    results: Tensor
    torch_error: float


def check(case: ModelCase, name: str) -> None:
    """The whole system at a small image, and its head at the size that is timed.

    The truth is the dense form in float64. Logits or gradients are at most twice as far from it as
    plain PyTorch's, by their norm: signs of |M| and of ReLU hang on rounding. The loss within 1e-4.
    """
    model = make_model(name).train(case.training)
    for part in (_whole, _head):
        truth, what = _truth(case, SYSTEMS[name], part), part.__name__[1:]
        loss, results = _evaluate(part(model), truth.inputs, case.training)
        if case.training:
            error = _distance(loss, truth.loss)
            assert error < 1e-4, f"{what}: the loss differs by {error:.1e}"
        error = _distance(results, truth.results)
        assert error <= 2 * truth.torch_error + torch.finfo(torch.float32).eps, (
            f"{what}: differs by {error:.1e} of the norm, plain PyTorch by {truth.torch_error:.1e}"
        )


def _whole(model: Classifier) -> Classifier:
    return model


def _head(model: Classifier) -> Classifier:
    """The same model and parameters, called with the backbone's map."""
    head = copy.copy(model)
    head._modules = {**model._modules, "backbone": nn.Identity()}
    return head


@lru_cache(maxsize=2)
def _truth(
    case: ModelCase, system: tuple[str, str], part: Callable[[Classifier], Classifier]
) -> Truth:
    """Shared by all forms of a system."""
    judge = _judge(*system).train(case.training)
    inputs = noise(2, _SMALL)
    if part is _head:
        (name, *_) = (name for name, other in SYSTEMS.items() if other == system)
        with torch.no_grad():
            backbone = make_model(name).train(case.training).backbone
            inputs = backbone(noise(case.batch, case.size))[:2].clone()
    loss, results = _evaluate(part(judge), inputs.double(), case.training)
    judge.zero_grad(set_to_none=True)
    plain = part(copy.deepcopy(judge).float())
    torch_error = _distance(_evaluate(plain, inputs, case.training)[1], results)
    return Truth(inputs, loss, results, torch_error)


def _evaluate(model: Classifier, inputs: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """A loss (0 in inference), and the logits or the gradients of inputs and parameters."""
    if not training:
        return inputs.new_zeros(()), infer(model, inputs)
    inputs = inputs.detach().requires_grad_()
    loss = loss_and_gradients(model, inputs, labels(len(inputs)))
    found = [inputs.grad, *(p.grad for p in model.parameters())]
    return loss, torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def _distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@lru_cache(maxsize=1)
def _judge(method: str, backbone: str) -> Classifier:
    (name, *_) = (name for name, system in SYSTEMS.items() if system == (method, backbone))
    judge = build_model(method, _CLASSES, backbone, pooled=False, backend="reference")
    judge.load_state_dict(make_model(name).state_dict())
    for module in judge.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return judge.double().to(DEVICE)


def work(case: ModelCase, name: str) -> Work:
    """Operations of the backbone and head; bytes of the weights, read at least once."""
    method, backbone = SYSTEMS[name]
    system = f"{backbone}-{method}" if method != "plain" else backbone
    flops = case.batch * _flops(system, case.size) * (_STEP if case.training else 1)
    return Work(flops, 4 * parameters(make_model(system)))


@cache
def _flops(system: str, size: int) -> int:
    return model_flops(make_model(system), size, DEVICE)


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
