"""Which backend runs a call, and why the others do not.

``reference`` and ``matmul`` run anywhere. ``cpu`` is the compiled extension ``cin_fast._cpu``;
``triton`` lives in ``cin_fast.kernels``; ``cuda`` is the compiled extension ``cin_fast._C``.
Loading a backend attaches its kernels to the operators that ``cin_fast.operators`` has defined;
nothing is loaded before a tensor asks for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cin_fast import schemas
from cin_fast.registry import has_kernel

BACKENDS = ("reference", "matmul", "cpu", "triton", "cuda")

# In plain PyTorch.
_ANYWHERE = ("reference", "matmul")
_Function = TypeVar("_Function", bound=Callable[..., object])
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXTENSIONS = {"cpu": "_cpu", "cuda": "_C"}
# As many as csrc/cuda/host.cuh's kWide.
_FUSED_POSITIONS = 208
_BUILD = "python setup.py build_ext --inplace"
_DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def _constant_when_compiled(function: _Function) -> _Function:
    # torch.compiler.assume_constant_result, less its import of Dynamo and with it Triton: 2 s.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def preferred(device: str, dtype: torch.dtype, positions: int) -> tuple[str, ...]:
    """What ``backend=None`` tries for features of so many positions, first to last.

    On a GPU ``python bench/backends.py`` compares. In both directions the fused kernels win where
    operands fit into shared memory as tensor cores want them, sci by 3 to 5 times. Elsewhere
    library products are faster, up to 93 times as fast as ``cuda`` and 124 times as ``triton``,
    but for thin v at 7 x 7 in TF32, where they take 1.1 times as long as ``cuda``
    (docs/kernels.md, "Which backend where").
    """
    if device == "cpu":
        return ("cpu", "reference")
    if device != "cuda" or dtype not in _KERNEL_DTYPES:
        return ("reference",)
    if dtype != torch.float32 and positions <= _FUSED_POSITIONS:
        return ("cuda", "triton", "matmul")
    return ("matmul",)


def choose(x: Tensor) -> str:
    """The backend that ``backend=None`` means for these features.

    ``CIN_FAST_BACKEND`` overrides the table; a backend named there that cannot run raises
    ``ValueError`` with the reason.
    """
    forced = _environment_backend()
    if forced:
        return require(x, forced, "CIN_FAST_BACKEND")
    for backend in preferred(x.device.type, x.dtype, math.prod(x.shape[2:])):
        if not why_not(x, backend):
            return backend
    return "reference"


def require(x: Tensor, backend: str, source: str = "backend") -> str:
    """``backend``, if it can run on ``x``; if not, a ``ValueError`` that names ``source``."""
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    reason = why_not(x, backend)
    if reason:
        raise ValueError(f"{source}: {backend!r} cannot run here: {reason}")
    return backend


def why_not(x: Tensor, backend: str) -> str:
    """Why ``backend`` cannot run on ``x``, in one line; empty if it can."""
    if backend in _ANYWHERE:
        if backend == "matmul" and x.is_cuda:
            # Loads its passes over matrices; where there are none, torch's serve.
            unavailable("cuda")
        return ""
    device = x.device.type
    if device != _DEVICE_OF[backend] and not (backend == "triton" and _triton_interpreted()):
        return f"it runs on {_DEVICE_OF[backend]} tensors, found {device}"
    if x.dtype not in _KERNEL_DTYPES:
        return f"it takes float32, bfloat16 and float16, found {x.dtype}"
    return unavailable(backend)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD or torch.func is at work.

    Registered operators give no tangent there, and torch does not say so: the definition does.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        # Of a tensor in a graph nobody can tell whether it has a tangent: any may have one.
        return forward_ad._current_level >= 0
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def exported(backend: str) -> bool:
    """Whether a program is traced for where the operators are unknown: the definition serves there.

    ONNX knows none of them. A program of torch.export or torch.jit keeps a backend's own, but not
    those of the reference, which are asked for to do without this package.
    """
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not (tracing or torch.compiler.is_exporting()):
        return False
    return backend == "reference" or torch.onnx.is_in_onnx_export()


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast rounds what goes into an operator on this tensor's device."""
    # The meta device knows no autocast, and asking it is an error.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


@_constant_when_compiled
def unavailable(backend: str) -> str:
    """Why ``backend`` cannot run on this machine at all, in one line; empty if it can."""
    return _load(backend)


@_constant_when_compiled
def _environment_backend() -> str:
    return os.environ.get("CIN_FAST_BACKEND", "")


@_constant_when_compiled
def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _load(backend: str) -> str:
    if backend in _ANYWHERE:
        return ""
    if backend == "triton":
        return _load_triton()
    return (_no_gpu() if backend == "cuda" else "") or _load_extension(backend)


def _no_gpu() -> str:
    """Why no GPU can run our kernels; empty if one can."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"it needs compute capability 8.0, found {capability[0]}.{capability[1]}"
    return ""


def _load_triton() -> str:
    if not _triton_interpreted() and (reason := _no_gpu()):
        return reason
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        importlib.import_module("cin_fast.kernels").register()
    except ImportError as error:
        return f"cin_fast.kernels did not import: {error}"
    return ""


def _load_extension(backend: str) -> str:
    name = _EXTENSIONS[backend]
    library = _library(name)
    if library is None:
        reason = _build_record().get("reasons", {}).get(backend, "")
        if reason:
            return f"cin_fast.{name} was not built: {reason}"
        return f"cin_fast.{name} is not built ({_BUILD})"
    reason = _load_library(backend, library)
    if reason:
        # Who built it counts on it, and another backend is slower.
        warnings.warn(f"the {backend} backend is off: {reason}", stacklevel=2)
    return reason


def _load_library(backend: str, library: str) -> str:
    name = _EXTENSIONS[backend]
    # What was built beside another torch than its own (a classic extension), or for other schemas,
    # may end the process when it is loaded instead of raising, so the record is compared first.
    record = _build_record()
    built_with = record.get("torch", torch.__version__)
    if backend == "cpu" and built_with != torch.__version__:
        return f"cin_fast.{name} was built for torch {built_with}, this is {torch.__version__}"
    for stem, schema in schemas.COMPILED[backend].items():
        if record.get("schemas", {}).get(f"{backend}_{stem}") != schema:
            return f"cin_fast.{name} was built for another schema of {stem}: build again ({_BUILD})"
    try:
        # The extensions hold operators and no Python, so any interpreter can load them.
        torch.ops.load_library(library)
    except (ImportError, OSError) as error:
        return f"cin_fast.{name} did not load: {error}"
    for stem in schemas.COMPILED[backend]:
        if not has_kernel(f"cin_fast::{backend}_{stem}", backend.upper()):
            return f"cin_fast.{name} holds no {stem}: build again ({_BUILD})"
    return ""


def _library(name: str) -> str | None:
    # Beside this file and nowhere else: an editable install would offer another checkout's.
    found = PathFinder.find_spec(f"cin_fast.{name}", [str(Path(__file__).parent)])
    return found.origin if found else None


def _build_record() -> dict[str, Any]:
    """What setup.py wrote beside the extensions: for which torch and schemas, what is left out."""
    path = Path(__file__).parent / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}
