"""A model as a run left it, ready to be used on images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cin_fast import checkpoint as checkpoints
from cin_fast.config import NOT_RECORDED, TrainConfig, from_mapping
from cin_fast.data.transforms import image_transform
from cin_fast.models import Classifier, build_model


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, with what belongs to it."""

    model: Classifier
    classes: tuple[str, ...]
    config: TrainConfig
    device: torch.device

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From a PIL image to what the model sees."""
        return image_transform(self.config.image_size, train=False)


def load_trained(path: str | Path, device: torch.device | str = "cpu") -> Trained:
    """The model of a checkpoint, or of a run folder's last.pt.

    Raises:
        CheckpointError: if it cannot be read or does not fit.
        ValueError: for settings or a backbone that this version does not know.
    """
    path = Path(path)
    file = path / checkpoints.LAST if path.is_dir() else path
    state = checkpoints.load(file)
    # Some checkpoints hold what was asked of the output folder, too.
    settings = {k: v for k, v in state.settings.items() if k not in NOT_RECORDED}
    config = from_mapping(settings, str(file))
    model = build_model(
        config.method,
        state.num_classes,
        config.backbone,
        pooled=config.pooled,
        embedding_dim=config.embedding_dim,
    )
    checkpoints.load_weights(model, state.model, file)
    place = torch.device(device)
    return Trained(model.to(place).eval(), state.classes, config, place)
