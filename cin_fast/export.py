"""``cin-fast-export``: the inference model as ONNX or torch.export.

The pooled form needs no operator of this project: each is replaced by the matrix products and the
softmax that define it (cin_fast.reference), so that any runtime can read the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from cin_fast import command, reference, thin
from cin_fast.data.transforms import IMAGENET_DEVIATION, IMAGENET_MEAN, resized_side
from cin_fast.dispatch import BACKENDS
from cin_fast.files import replacing
from cin_fast.operators import TAP_BACKENDS
from cin_fast.trained import Trained, load_trained

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_SUFFIXES = (".onnx", ".pt2")
# Two images: an example of one would make the batch a constant.
_EXAMPLE = 2


class ExportError(ValueError):
    """A model that ONNX cannot hold, with the reason and what to do."""


def export_program(trained: Trained) -> ExportedProgram:
    """The model from images (B, 3, S, S) to logits (B, classes), any B, as aten operators alone."""
    size = trained.config.image_size
    images = torch.zeros(_EXAMPLE, 3, size, size, device=trained.device)
    program = torch.export.export(
        trained.model.eval(), (images,), dynamic_shapes=({0: Dim("batch")},)
    )
    return program.run_decompositions(_definitions())


def export_onnx(trained: Trained, path: Path) -> None:
    """Write the model as ONNX: input ``images``, output ``logits``, classes in its metadata.

    Raises:
        ExportError: if torch.onnx does not know an operator of the model.
        ImportError: naming the packages that are missing.
        WriteError: if the disk refuses.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnx

    model = _to_onnx(trained).model_proto
    for key, value in _metadata(trained).items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    with replacing(path) as beside:
        onnx.save(model, beside)


def _to_onnx(trained: Trained) -> torch.onnx.ONNXProgram:
    try:
        program = torch.onnx.export(
            export_program(trained),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        config = trained.config
        raise ExportError(
            f"{config.method} on {config.backbone} cannot be written as ONNX ({_reason(error)}); "
            "--output FILE.pt2 writes it for torch.export"
        ) from error
    assert program is not None
    return program


def _reason(error: BaseException) -> str:
    # torch.onnx wraps what went wrong in pages of advice.
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_onnx(trained: Trained, path: Path, images: Tensor) -> float:
    """The largest difference of onnxruntime's logits for ``images`` to PyTorch's, relative."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.cpu().numpy()})
    with torch.inference_mode():
        expected = trained.model(images.to(trained.device)).cpu()
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


def _metadata(trained: Trained) -> dict[str, str]:
    config = trained.config
    # In this order, from an RGB image of any size.
    prepared = {
        "resize": [resized_side(config.image_size)] * 2,
        "interpolation": "bilinear, antialiased",
        "center_crop": [config.image_size] * 2,
        "divide_by": 255,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_DEVIATION,
    }
    return {
        "classes": json.dumps(trained.classes),
        "image_size": str(config.image_size),
        "preprocessing": json.dumps(prepared),
        "method": config.method,
        "backbone": config.backbone,
    }


def _definitions() -> dict[Any, Callable[..., Any]]:
    ours = torch.ops.cin_fast
    table: dict[Any, Callable[..., Any]] = {
        getattr(ours, f"{name}_sci").default: _sci for name in BACKENDS
    }
    table |= {
        getattr(ours, f"{name}_sci_values").default: _sci_values
        for name in BACKENDS
        if hasattr(ours, f"{name}_sci_values")
    }
    table |= {
        getattr(ours, f"{name}_tap_means").default: reference.tap_means for name in TAP_BACKENDS
    }
    return table | {thin.OPERATOR.default: torch.nn.functional.linear}


def _sci_values(x: Tensor, v: Tensor | None, scale: float) -> Tensor:
    return reference.sci(x, x if v is None else v, scale)


def _sci(x: Tensor, v: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # What its backward pass would need is not there in inference.
    rows = x.new_zeros(x.shape[:2])
    return _sci_values(x, v, scale), rows, rows, x.new_zeros(0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints errors as one line and returns 2 for them."""
    options = _parser().parse_args(argv)

    def body() -> int:
        if options.output.suffix not in _SUFFIXES:
            raise ValueError(
                f"--output: expected {' or '.join(_SUFFIXES)}, found {options.output.name!r}"
            )
        trained = load_trained(options.checkpoint)
        command.writable_folder(options.output.parent)
        if options.output.is_dir():
            raise ValueError(f"--output: {options.output} is a folder")
        print(_write(trained, options.output))
        return 0

    return command.run("cin-fast-export", body)


def _write(trained: Trained, path: Path) -> str:
    if path.suffix == ".pt2":
        extra = {"metadata.json": json.dumps(_metadata(trained))}
        # By way of memory: where the disk refuses, torch's writer ends the process.
        archive = io.BytesIO()
        torch.export.save(export_program(trained), archive, extra_files=extra)
        with replacing(path) as beside:
            beside.write_bytes(archive.getbuffer())
        return f"{path}: torch.export, images (B, 3, S, S) to logits"
    export_onnx(trained, path)
    size = trained.config.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    error = check_onnx(trained, path, images)
    return f"{path}: ONNX; onnxruntime differs from PyTorch by {error:.1e} of the largest logit"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cin-fast-export",
        description="Write a trained model for inference elsewhere: plain matrix products and a "
        "softmax, any number of images at once. Class names, and how an image is prepared, stand "
        "in its metadata (of FILE.pt2: metadata.json).",
        epilog="example: cin-fast-export runs/my_run --output birds.onnx",
    )
    command.add_checkpoint(parser, positional=True)
    parser.add_argument("--output", type=command.path, required=True, metavar="FILE",
                        help="FILE.onnx, or FILE.pt2 for torch.export")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
