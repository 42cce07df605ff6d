"""One frozen dataclass holds every setting of a run, with the paper's values as defaults."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, get_type_hints

from cin_fast.checkpoint import LAST
from cin_fast.data import dataset_names
from cin_fast.dispatch import BACKENDS
from cin_fast.models import METHODS

# Settings that decide where and how fast a run goes, not what is learnt.
INDIFFERENT = frozenset(
    {
        "output", "resume", "overwrite", "workers", "device", "data_root", "eval_batch_size",
        "profile", "compile",
    }
)  # fmt: skip
SETTINGS = "settings.json"
# What to do with an earlier run in the output folder: said anew each time.
NOT_RECORDED = ("resume", "overwrite")
# Settings that may begin with ~, which no shell expands in a file or after =.
_PATHS = ("data_root", "output", "weights")
# What weights may be beside a path.
_NO_PATHS = ("imagenet", "none")
# Samplers multiply a seed by epochs and processes, and a generator takes 64 bits.
_LARGEST_SEED = 10**8
_AMP = ("auto", "bf16", "fp16", "none")


def _setting(default: Any, group: str, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"group": group, "help": help, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of ``cin-fast-train``; each field is the option of the same name."""

    dataset: str = _setting("synthetic", "data", "what to train on", dataset_names())
    data_root: str = _setting(
        "", "data", "folder of the dataset (default: $CIN_FAST_DATA, then ./data)"
    )
    image_size: int = _setting(448, "data", "side of the crops that the network sees, in pixels")
    workers: int = _setting(2, "data", "processes that load images; 0 loads in the main one")
    skip_bad_images: bool = _setting(
        False, "data", "leave out images that cannot be read, and list them, instead of stopping"
    )

    method: str = _setting("cin", "model", "the system to train", tuple(METHODS))
    backbone: str = _setting(
        "resnet50", "model", "resnet18/34/50/101/152, vgg19 and its kin, or any timm name"
    )
    weights: str = _setting(
        "imagenet", "model", "what the backbone starts from: imagenet, none, FILE or a run's folder"
    )
    embedding_dim: int = _setting(512, "model", "r of Eq. 8: dimensions that pairs are compared in")
    pooled: bool = _setting(
        True, "model", "skip the 3x3 convolution by its identity (the same values, faster)"
    )
    backend: str = _setting(
        "auto", "model", "which kernels run channel interaction", ("auto", *BACKENDS)
    )

    epochs: int = _setting(100, "recipe", "passes over the training set")
    classes_per_batch: int = _setting(4, "recipe", "classes in a batch")
    images_per_class: int = _setting(5, "recipe", "images of each class in a batch")
    lr: float = _setting(0.001, "recipe", "learning rate of SGD")
    lr_step: int = _setting(20, "recipe", "epochs after which the learning rate decays")
    lr_decay: float = _setting(0.5, "recipe", "what it is multiplied by then")
    momentum: float = _setting(0.9, "recipe", "momentum of SGD")
    weight_decay: float = _setting(2e-4, "recipe", "weight decay of SGD")
    clip_norm: float = _setting(
        0.0, "recipe", "largest norm of the gradient; 0 leaves it alone, as the paper does"
    )
    alpha: float = _setting(2.0, "recipe", "weight of the contrastive loss (Eq. 9)")
    margin: float = _setting(0.5, "recipe", "beta of Eq. 8")
    seed: int = _setting(0, "recipe", "seed of weights, sampling and augmentation")

    device: str = _setting("auto", "run", "auto, cpu, cuda or cuda:N")
    amp: str = _setting(
        "auto", "run", "mixed precision; auto is bf16 on CUDA, none elsewhere", _AMP
    )
    compile: bool = _setting(False, "run", "run the model through torch.compile")
    eval_every: int = _setting(1, "run", "epochs between evaluations; the last one always has one")
    eval_batch_size: int = _setting(32, "run", "images a batch in evaluation")
    profile: bool = _setting(False, "run", "write a torch profiler trace of a few steps")
    output: str = _setting(
        "", "run", "folder of the run (default: runs/DATASET-METHOD-BACKBONE-sSEED)"
    )
    resume: bool = _setting(False, "run", "go on from the checkpoint in the output folder")
    overwrite: bool = _setting(False, "run", "replace a run that the output folder already holds")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(
                    f"{_option(field.name)}: expected one of {', '.join(choices)}, found {value!r}"
                )
        for name in (
            "image_size", "embedding_dim", "epochs", "classes_per_batch", "images_per_class",
            "lr_step", "eval_every", "eval_batch_size",
        ):  # fmt: skip
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            self._require(field.name, not isinstance(value, float) or isfinite(value), "a number")
        for name in ("workers", "weight_decay", "clip_norm", "alpha"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "lr_decay", "margin"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("momentum", 0 <= self.momentum < 1, "from 0 to below 1")
        self._require("seed", 0 <= self.seed <= _LARGEST_SEED, f"0 to {_LARGEST_SEED}")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with a run, --overwrite replaces it: take one")
        pairs = self.classes_per_batch * self.images_per_class
        if pairs % 2:
            raise ValueError(
                f"--classes-per-batch {self.classes_per_batch} x --images-per-class "
                f"{self.images_per_class} is odd: a batch of {pairs} cannot be split into pairs"
            )

    @property
    def batch_size(self) -> int:
        """Images a batch and process."""
        return self.classes_per_batch * self.images_per_class

    @property
    def model_backend(self) -> str | None:
        """What the model's operators take as ``backend``: None for auto."""
        return None if self.backend == "auto" else self.backend

    @property
    def output_folder(self) -> Path:
        """Where everything of the run goes."""
        name = f"{self.dataset}-{self.method}-{self.backbone}-s{self.seed}"
        return Path(self.output).expanduser() if self.output else Path("runs") / name

    def describe(self) -> str:
        """Every setting, grouped, a line each."""
        lines: list[str] = []
        for group in _groups():
            lines.append(f"{group}:")
            for field in _fields(group):
                lines.append(f"  {field.name:18}{getattr(self, field.name)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """What is recorded of the settings, as ``--config`` reads it."""
        return json.dumps(self.recorded(), indent=2)

    def recorded(self) -> dict[str, Any]:
        """Every setting but resume and overwrite."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in NOT_RECORDED}

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{_option(name)}: expected {expected}, found {getattr(self, name)}")


def from_mapping(values: Mapping[str, Any], source: str = "settings") -> TrainConfig:
    """A config from names and values, as settings.json or a YAML/TOML file hold them.

    Raises:
        ValueError: naming the setting, for an unknown one or a value of the wrong kind.
    """
    hints = get_type_hints(TrainConfig)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ValueError(f"{source}: unknown setting {key!r}; see cin-fast-train --help")
        kind = hints[name]
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            value = _as_float(source, key, value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{source}: {key} expected {kind.__name__}, found {value!r}")
        checked[name] = os.path.expanduser(value) if name in _PATHS else value
    if "weights" in checked:
        checked["weights"] = _weight_file(checked["weights"])
    return TrainConfig(**checked)


def _weight_file(weights: str) -> str:
    """A run's folder stands for its checkpoint, as in every other command."""
    if weights in _NO_PATHS or not os.path.isdir(weights):
        return weights
    return os.path.join(weights, LAST)


def parse(argv: Sequence[str] | None = None, command: str = "cin-fast-train") -> TrainConfig:
    """The config of a command line of ``command``.

    ``--config FILE`` gives defaults that options override; ``--output DIR --resume`` without it
    takes the settings that DIR was trained with.

    Raises:
        ValueError: naming the setting, the file and what was found.
    """
    options = vars(_parser(command).parse_args(argv))
    path = options.pop("config") or _settings_of_the_run(options)
    if path:
        return from_mapping({**read_settings(Path(path)), **options}, path)
    return from_mapping(options, "command line")


def _settings_of_the_run(options: Mapping[str, Any]) -> str:
    if not (options.get("resume") and options.get("output")):
        return ""
    settings = Path(options["output"]).expanduser() / SETTINGS
    return str(settings) if settings.is_file() else ""


def read_settings(file: Path) -> dict[str, Any]:
    """Names and values in a YAML, TOML or JSON file.

    Raises:
        ValueError: naming the file, if there is none or it cannot be read as what it is called.
    """
    file = file.expanduser()
    if not file.is_file():
        raise ValueError(f"--config: no file {file}")
    read = _READERS.get(file.suffix)
    if read is None:
        raise ValueError(f"--config: expected .yaml, .toml or .json, found {file}")
    try:
        loaded = read(file.read_text())
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as {file.suffix[1:]} ({reason})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds no settings")
    return loaded


def _yaml(text: str) -> Any:
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(node, yaml.MappingNode):
        _check_once(str(key.value) for key, _ in node.value)
    return yaml.safe_load(text)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once(key for key, _ in pairs)
    return dict(pairs)


def _check_once(keys: Iterable[str]) -> None:
    # Readers take the last one and say nothing.
    counts = Counter(key.replace("-", "_") for key in keys)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} stands there twice; remove one")


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    loaded = tomllib.loads(text)
    _check_once(loaded)
    return loaded


_READERS: dict[str, Callable[[str], Any]] = {
    ".yaml": _yaml,
    ".yml": _yaml,
    ".toml": _toml,
    ".json": _json,
}


def _as_float(source: str, key: str, value: int | str) -> float:
    # YAML reads 2e-4 as text.
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{source}: {key} expected a number, found {value!r}") from error


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command,
        description="Train a fine-grained classifier; the defaults are the paper's recipe.",
        epilog="example: cin-fast-train --dataset cub --data-root CUB_200_2011 --method cin",
        argument_default=argparse.SUPPRESS,
        # What another command refuses by name could be said by a part of it.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", default=None, metavar="FILE", help="settings from a YAML, TOML or JSON file"
    )
    hints = get_type_hints(TrainConfig)
    for group in _groups():
        arguments = parser.add_argument_group(group)
        for field in _fields(group):
            kind, text = hints[field.name], str(field.metadata["help"]).replace("%", "%%")
            # 0 is a default worth showing, and equals False.
            if field.default != "" and field.default is not False:
                text += f" (default: {field.default})"
            if kind is bool:
                arguments.add_argument(
                    _option(field.name), action=argparse.BooleanOptionalAction, help=text
                )
            else:
                arguments.add_argument(
                    _option(field.name), type=kind, choices=field.metadata["choices"], help=text,
                    metavar=None if field.metadata["choices"] else _metavar(field.name, kind),
                )  # fmt: skip
    return parser


def _metavar(name: str, kind: type) -> str:
    if name in ("data_root", "output"):
        return "DIR"
    return {int: "N", float: "X"}.get(kind, "NAME")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fields(group: str) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(TrainConfig) if f.metadata["group"] == group]


def _groups() -> list[str]:
    return list(dict.fromkeys(f.metadata["group"] for f in dataclasses.fields(TrainConfig)))
