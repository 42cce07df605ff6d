"""Backbones by name: a network's last feature map, with its channels and stride.

torchvision's ResNets and VGGs by their torchvision names; any other name is asked of timm, if it
is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from cin_fast.files import load_tensors

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VGGS = ("vgg11_bn", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")
IMAGENET = "imagenet"
# What wrappers and whole networks put before the names of a body's weights.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.body.", "features.")


class Backbone(nn.Module):
    """Images (B, 3, H, W) to maps (B, ``channels``, H / ``stride``, W / ``stride``)."""

    def __init__(self, body: nn.Module, channels: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.channels = channels
        self.stride = stride
        # Some of timm's transformers put the channels last.
        self.permuted = str(getattr(body, "output_fmt", "")).endswith("NHWC")

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        x = features[-1] if isinstance(features, (list, tuple)) else features
        return x.permute(0, 3, 1, 2) if self.permuted else x


def build_backbone(name: str, pretrained: bool | str | Path | None = False) -> Backbone:
    """A backbone by name.

    Args:
        name: a torchvision ResNet or VGG, or any timm model name where timm is installed.
        pretrained: True or ``"imagenet"`` for the library's ImageNet weights, False, None or
            ``"none"`` for random ones, or the path of a local weight file.

    Raises:
        ValueError: for an unknown name, or a weight file that cannot be read or does not fit.
        FileNotFoundError: where weights cannot be had, naming the file to place.
    """
    source = weight_source(pretrained)
    if name in RESNETS:
        backbone = _resnet(name)
    elif name in VGGS:
        backbone = _vgg(name)
    else:
        return _timm(name, source)
    if source is not None:
        _load(backbone.body, _state_dict(name, source), f"{name} from {source}")
    return backbone


def stride_of(name: str) -> int:
    """Input pixels a side that one position of the backbone's map stands for."""
    if name in RESNETS:
        return 32
    if name in VGGS:
        return 16
    return build_backbone(name).stride


def check_image_size(name: str, image_size: int) -> None:
    """Refuse, with ``ValueError``, images that a backbone makes no map of."""
    if name in RESNETS or name in VGGS:
        stride, reason = stride_of(name), ""
    else:
        backbone = build_backbone(name).eval()
        stride, reason = backbone.stride, _refusal(backbone, image_size)
    if image_size < stride:
        raise ValueError(
            f"--image-size: {image_size} is smaller than the stride of {name} ({stride}): its map "
            "would be empty"
        )
    if reason:
        raise ValueError(f"--image-size: {name} does not take {image_size} pixels ({reason})")


@torch.inference_mode()
def _refusal(backbone: Backbone, image_size: int) -> str:
    # Many of timm's transformers are made for one size, and say so only when they run.
    try:
        backbone(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


def weight_source(pretrained: bool | str | Path | None) -> str | None:
    """``"imagenet"``, a file's path, or None for random weights."""
    if pretrained is True:
        return IMAGENET
    if pretrained is False or pretrained is None or str(pretrained) == "none":
        return None
    return str(pretrained)


def _resnet(name: str) -> Backbone:
    net = torchvision.models.get_model(name, weights=None)
    body = nn.Sequential()
    for child in (
        "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4",
    ):  # fmt: skip
        body.add_module(child, getattr(net, child))
    return Backbone(body, net.fc.in_features, 32)


def _vgg(name: str) -> Backbone:
    # Without the last pooling: 28 x 28 positions at 448 pixels.
    features = torchvision.models.get_model(name, weights=None).features[:-1]
    return Backbone(features, 512, 16)


def _timm(name: str, source: str | None) -> Backbone:
    known = ", ".join(RESNETS + VGGS)
    if importlib.util.find_spec("timm") is None:
        raise ValueError(
            f"backbone: {name!r} is none of {known}; with timm installed (pip install timm), any "
            "timm model name works"
        )
    import timm

    if not timm.is_model(name):
        raise ValueError(f"backbone: {name!r} is none of {known}, nor a model that timm knows")
    pretrained = source == IMAGENET
    try:
        body = timm.create_model(name, pretrained=pretrained, features_only=True)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ValueError(f"backbone: timm's {name} gives no feature map ({error})") from error
        raise FileNotFoundError(
            f"ImageNet weights of timm's {name} could not be had ({error}); take a local weight "
            "file (--weights FILE) or none (--weights none)"
        ) from error
    if source is not None and not pretrained:
        body = _with_weights(name, body, source)
    info: Any = body.feature_info
    return Backbone(body, info.channels()[-1], info.reduction()[-1])


def _with_weights(name: str, body: nn.Module, source: str) -> nn.Module:
    """timm's body of ``name`` with a file's weights: ours of that body, or timm's whole network."""
    import timm

    state = _read(Path(source))
    if not _fits(state, body.state_dict()):
        # Many of its bodies call the network's weights by other names, which timm knows. It would
        # pass over what does not fit.
        whole = timm.create_model(name, num_classes=0).state_dict()
        found = _unwrapped(state, whole)
        if _fits(found, whole):
            checked = {"state_dict": {key: found[key] for key in whole}}
            return timm.create_model(
                name, pretrained=True, features_only=True, pretrained_cfg_overlay=checked
            )
    _load(body, state, f"{name} from {source}")
    return body


def _state_dict(name: str, source: str) -> dict[str, Tensor]:
    if source != IMAGENET:
        return _read(Path(source))
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise FileNotFoundError(
            f"ImageNet weights of {name} could not be downloaded from {weights.url} ({error}); "
            f"place the file at {place}, or train without them (--weights none), or take another "
            "file (--weights FILE)"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {path}; give a weight file, imagenet or none")
    try:
        loaded = load_tensors(path)
    except OSError as error:
        raise ValueError(f"weights: {path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(
            f"weights: {path} is damaged or no weight file; expected a state dict that torch.save "
            "wrote"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(f"weights: {path} holds no state dict")
    return loaded


def _load(body: nn.Module, state: dict[str, Tensor], what: str) -> None:
    wanted = body.state_dict()
    found = _unwrapped(state, wanted)
    missing = [key for key in wanted if key not in found]
    wrong = [key for key in wanted if key in found and found[key].shape != wanted[key].shape]
    if missing or wrong:
        problem = f"lacks {missing[0]}" if missing else f"has another shape of {wrong[0]}"
        raise ValueError(
            f"weights: {what} does not fit: it {problem} ({len(missing)} missing, {len(wrong)} of "
            f"the wrong shape, of {len(wanted)})"
        )
    body.load_state_dict({key: found[key] for key in wanted})


def _unwrapped(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` less as many prefixes as it takes to find the names of ``wanted``."""
    while not wanted.keys() <= state.keys():
        prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fits(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    found = _unwrapped(state, wanted)
    return all(name in found and found[name].shape == t.shape for name, t in wanted.items())
