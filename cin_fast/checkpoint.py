"""Checkpoints that a kill at any moment leaves intact, and that say why they are refused.

A checkpoint is one file of tensors and plain values, read with ``weights_only=True``; its SHA-256
stands beside it. Both are written to the side and renamed into place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cin_fast.files import WriteError, load_tensors, replacing, write_text

# A run folder's, after its last whole epoch.
LAST = "last.pt"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason and the fix."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to go on with a run, or to use its model."""

    model: dict[str, Tensor]
    settings: dict[str, Any]
    classes: tuple[str, ...]
    epoch: int
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    rng: Tensor
    history: dict[str, float]
    # The loss's scale in float16; empty where it has none.
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """How many classes the model tells apart."""
        return len(self.classes)


def save(path: Path, checkpoint: Checkpoint) -> str:
    """Write ``checkpoint`` to ``path`` and its hash to ``path.sha256``; returns the hash.

    Raises:
        CheckpointError: if the disk refuses; what stood at ``path`` before is untouched.
    """
    content = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    content |= {"format": FORMAT, "classes": list(checkpoint.classes)}
    try:
        with replacing(path) as beside:
            torch.save(content, beside)
            digest = file_hash(beside)
            # Until the file has its name, that of the one before it is right, too: whichever of
            # several, where more than one writing was cut off here.
            _write_digests(path, [digest, *_digests(path)])
        _write_digests(path, [digest])
    except WriteError as error:
        raise CheckpointError(str(error)) from error
    return digest


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: if there is none, it is damaged, or it is no checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    digests = _digests(path)
    if digests and file_hash(path) not in digests:
        raise CheckpointError(
            f"{path} is damaged: its hash is not the one in {_hash_file(path)} (remove that to "
            "use it all the same)"
        )
    try:
        content = load_tensors(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        beside = "its hash agrees with the one" if digests else "no hash stands"
        raise CheckpointError(f"{path} is damaged or no checkpoint; {beside} beside it") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} is no checkpoint of format {FORMAT}: found {found}")
    content.pop("format")
    wanted = {one.name for one in fields(Checkpoint) if one.default_factory is MISSING}
    missing = wanted - set(content)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}")
    unknown = set(content) - {one.name for one in fields(Checkpoint)}
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise CheckpointError(f"{path} holds {names}, which this version does not know")
    return Checkpoint(**{**content, "classes": tuple(content["classes"])})


def load_weights(model: torch.nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        CheckpointError: naming the first parameter that does not fit.
    """
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise CheckpointError(f"{source} is of another model: it lacks {name}")
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source} is of another model: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    extra = sorted(set(state) - set(wanted))
    if extra:
        raise CheckpointError(f"{source} is of another model: it has {extra[0]} besides")
    model.load_state_dict(dict(state))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digests(path: Path) -> list[str]:
    beside = _hash_file(path)
    lines = beside.read_text(errors="replace").splitlines() if beside.is_file() else []
    return [line.split()[0] for line in lines if line.strip()]


def _write_digests(path: Path, digests: list[str]) -> None:
    write_text(_hash_file(path), "".join(f"{digest}  {path.name}\n" for digest in digests))
