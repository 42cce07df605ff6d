"""The CUDA kernels of csrc/cuda, compiled with g++ and executed on the CPU.

Registers them as ``cin_fast::cuda_*`` for CPU tensors, so that the checks of cin_fast.testing run
unchanged. A race, a missing wait or an access out of bounds raises with the kernel's file and line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cin_fast import dispatch, schemas

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GUARD = 4096
AMPERE, HOPPER = 80, 90
_SHARED_LIMIT = {AMPERE: 166912, HOPPER: 232448}
_FLAGS = (
    *("-std=c++20", "-DCIN_FAST_EMULATION", "-g1", "-fPIC", "-march=native", "-Wall", "-Werror"),
    *("-Wno-unknown-pragmas", "-Wno-subobject-linkage", "-Wno-maybe-uninitialized"),
)


class EmulationError(RuntimeError):
    """What the emulation found wrong, with the file and line of the kernel's code."""


_CHIP = ("float32_products", "shared_limit", "capability", "multiprocessors")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("dtype", "batch", "channels", "positions", "columns")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _CHIP),
    )


def build(csrc: Path, folder: Path) -> Path:
    """Compile the kernels and the emulation; returns the shared library, objects beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*csrc.glob("cuda/*.cu"), *csrc.glob("emulation/*.cpp")]
    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(lambda source: compile_one(source, folder), sources))
    return link(objects, folder)


def rebuild(source: Path, library: Path, folder: Path) -> Path:
    """``library`` of ``build`` with one of its sources, changed, compiled again into ``folder``.

    What that source instantiates no more stays as it was.
    """
    # Of what several objects define, the linker keeps the first one's.
    objects = [compile_one(source, folder), *sorted(library.parent.glob("*.o"))]
    return link(objects, folder, "-Wl,--allow-multiple-definition")


def compile_one(source: Path, folder: Path) -> Path:
    # Kernels alone are instrumented: each plain load and store then calls the emulation.
    kernels = ["-x", "c++", "-O1", "-fsanitize=thread"]
    own = kernels if source.suffix == ".cu" else ["-O2"]
    compiled = folder / f"{source.name}.o"
    run(["g++", *_FLAGS, *own, "-c", str(source), "-o", str(compiled)])
    return compiled


def link(objects: Sequence[Path], folder: Path, *options: str) -> Path:
    library = folder / "libemulation.so"
    run(["g++", "-shared", *options, *map(str, objects), "-o", str(library), "-ldl"])
    return library


def build_probe(source: Path, library: Path, folder: Path) -> Path:
    """The probes of the PTX wrappers, over the emulation that ``build`` compiled."""
    runtime = [o for o in library.parent.glob("*.cpp.o") if o.stem != "harness.cpp"]
    return link([compile_one(source, folder), *runtime], folder)


def run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")


@contextlib.contextmanager
def registered(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The kernels of a built library as the ``cuda`` backend of CPU tensors."""
    monkeypatch.setitem(dispatch._DEVICE_OF, "cuda", "cpu")
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: "")
    emulator = Emulator(library)
    registration = emulator.register()
    try:
        yield emulator
    finally:
        registration._destroy()


class Emulator:
    """One built library; ``register`` makes it the ``cuda`` backend of CPU tensors."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_error.restype = ctypes.c_char_p
        self._library.emulation_launched.restype = ctypes.c_char_p
        self._library.emulation_conflicts.restype = ctypes.c_long
        # How warps and blocks take turns: 0 forward, 1 backward, from 2 on a seed.
        self.order = 0
        self.float32_products = "highest"
        # So few that no wave of blocks leaves half of them idle.
        self.multiprocessors = 1
        self.choose(AMPERE)
        # Of the last call: cycles lost to bank conflicts, and the kernels that ran. Of all calls:
        # which kernels ran with how many bytes of shared memory a block.
        self.conflicts = 0
        self.launched: list[str] = []
        self.blocks: set[tuple[str, int]] = set()

    def choose(self, capability: int) -> None:
        """Emulates a chip of this compute capability, times ten."""
        self.capability = capability
        self.shared_limit = _SHARED_LIMIT[capability]

    def note_launches(self, report: str) -> None:
        """``name:bytes`` of each launch of a call, apart by spaces."""
        self.launched = []
        for launch in report.split():
            name, shared_bytes = launch.split(":")
            self.launched.append(name)
            self.blocks.add((name, int(shared_bytes)))

    def register(self) -> torch.library.Library:
        """The operators stay registered for as long as the result lives."""
        library = torch.library.Library("cin_fast", "IMPL")
        for name in schemas.COMPILED["cuda"]:
            library.impl(f"cuda_{name}", getattr(self, name), "CPU")
        return library

    def sci(
        self, x: Tensor, v: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._sci(x, v, scale, keeps_rest=x.dtype != torch.float32)

    def sci_values(self, x: Tensor, v: Tensor | None, scale: float) -> Tensor:
        return self._sci(x, v, scale, keeps_rest=False)[0]

    def _sci(
        self, x: Tensor, v: Tensor | None, scale: float, *, keeps_rest: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = _Arguments(self, x, v, scale)
        shape = (x if v is None else v).shape
        y = arguments.output(shape, x.dtype)
        rest = arguments.output(shape, x.dtype) if keeps_rest else None
        row_max = arguments.output(x.shape[:2], torch.float32)
        row_sum = arguments.output(x.shape[:2], torch.float32)
        arguments.call("emulated_sci_forward", [x, v], [y, rest, row_max, row_sum])
        return y, row_max, row_sum, x.new_empty(0) if rest is None else rest

    def sci_backward(
        self,
        dy: Tensor,
        x: Tensor,
        v: Tensor | None,
        y: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        y_rest: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        arguments = _Arguments(self, x, v, scale)
        dx = arguments.output(x.shape, x.dtype)
        dv = None if v is None else arguments.output(v.shape, v.dtype)
        inputs = [dy, x, v, y, y_rest, row_max, row_sum]
        arguments.call("emulated_sci_backward", inputs, [dx, dv])
        return dx, x.new_empty(0) if dv is None else dv

    def cci(
        self, x: Tensor, partner: Tensor, eta: Tensor, v: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = _Arguments(self, x, v, scale)
        y = arguments.output((x if v is None else v).shape, x.dtype)
        row_max = arguments.output(x.shape[:2], torch.float32)
        row_sum = arguments.output(x.shape[:2], torch.float32)
        arguments.call("emulated_cci_forward", [x, v, partner, eta], [y, row_max, row_sum])
        return y, x.new_empty(0), row_max, row_sum

    def cci_after_sci(
        self,
        x: Tensor,
        partner: Tensor,
        eta: Tensor,
        v: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        arguments = _Arguments(self, x, v, scale)
        y = arguments.output(v.shape, x.dtype)
        inputs = [x, v, partner, eta, row_max, row_sum]
        arguments.call("emulated_cci_after_sci", inputs, [y])
        return y, x.new_empty(0)

    def cci_backward(
        self,
        dy: Tensor,
        x: Tensor,
        partner: Tensor,
        eta: Tensor,
        v: Tensor | None,
        y: Tensor,
        b: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = _Arguments(self, x, v, scale)
        dx = arguments.output(x.shape, x.dtype)
        deta = arguments.output(eta.shape, torch.float32)
        dv = None if v is None else arguments.output(v.shape, v.dtype)
        inputs = [dy, x, v, partner, eta, row_max, row_sum]
        arguments.call("emulated_cci_backward", inputs, [dx, deta, dv])
        return dx, deta, x.new_empty(0) if dv is None else dv

    def tap_means(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        arguments = _Arguments(self, flat, None, 1.0, columns=x.shape[3])
        v = arguments.output((*x.shape[:2], 9), x.dtype)
        arguments.call("emulated_tap_means", [flat], [v])
        return v

    def tap_means_backward(self, dv: Tensor, height: int, width: int) -> Tensor:
        like = dv.new_empty((1, 1, 1)).expand(*dv.shape[:2], height * width)
        arguments = _Arguments(self, like, None, 1.0, columns=width)
        dx = arguments.output((*dv.shape[:2], height, width), dv.dtype)
        arguments.call("emulated_tap_means_backward", [dv.contiguous()], [dx])
        return dx

    def softmax_rows(self, weights: Tensor, logits: Tensor, scale: float) -> None:
        self._rows("emulated_softmax_rows", [logits], [weights], scale)

    def softmax_rows_backward(
        self, weights: Tensor, ds: Tensor, logits: Tensor, dp: Tensor, scale: float
    ) -> None:
        self._rows("emulated_softmax_rows_backward", [logits, dp], [weights, ds], scale)

    def cci_rows(
        self, weights: Tensor, logits: Tensor, partner: Tensor, eta: Tensor, scale: float
    ) -> None:
        self._rows("emulated_cci_rows", [logits, partner, eta], [weights], scale)

    def cci_rows_backward(
        self,
        weights: Tensor,
        ds: Tensor,
        deta: Tensor,
        logits: Tensor,
        d: Tensor,
        partner: Tensor,
        eta: Tensor,
        scale: float,
    ) -> None:
        inputs = [logits, d, partner, eta]
        self._rows("emulated_cci_rows_backward", inputs, [weights, ds, deta], scale)

    def _rows(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float
    ) -> None:
        arguments = _Arguments(self, inputs[0].to(outputs[0].dtype), None, scale)
        results = [arguments.output(t.shape, t.dtype) for t in outputs]
        arguments.call(name, inputs, results)
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)


class _Arguments:
    """One call: inputs and outputs lie between guards, outputs are poisoned with NaN."""

    def __init__(
        self,
        emulator: Emulator,
        x: Tensor,
        v: Tensor | None,
        scale: float,
        columns: int | None = None,
    ) -> None:
        self._emulator = emulator
        self._library = emulator._library
        batch, channels, positions = x.shape
        self._call = _Call(
            _DTYPES[x.dtype],
            batch,
            channels,
            positions,
            columns or (positions if v is None else v.shape[2]),
            scale,
            int(emulator.float32_products != "highest"),
            emulator.shared_limit,
            emulator.capability,
            emulator.multiprocessors,
        )
        self._library.emulation_reset(emulator.order, emulator.shared_limit)
        self._storage: list[Tensor] = []

    def output(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        result = self._guarded(count, dtype)
        result.fill_(float("nan"))
        return result.view(shape)

    def call(
        self, name: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
    ) -> None:
        pointers: list[object] = []
        for tensor in inputs:
            pointers += self._input(tensor)
        pointers += [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in outputs]
        code = getattr(self._library, name)(ctypes.byref(self._call), *pointers)
        error = self._library.emulation_error().decode()
        self._emulator.conflicts = self._library.emulation_conflicts()
        self._emulator.note_launches(self._library.emulation_launched().decode())
        if code or error:
            raise EmulationError(error or f"{name} returned {code}")

    def _input(self, tensor: Tensor | None) -> list[object]:
        if tensor is None:
            return [None, (ctypes.c_long * 3)()]
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = self._guarded(max(reach, 0) if tensor.numel() else 0, tensor.dtype)
        copy = flat.as_strided(tensor.shape, tensor.stride())
        # The same memory as the tensor's, repeated elements and gaps included.
        flat.copy_(tensor.detach().as_strided((flat.numel(),), (1,)))
        strides = [*tensor.stride(), 0, 0][:3]
        return [ctypes.c_void_p(copy.data_ptr()), (ctypes.c_long * 3)(*strides)]

    def _guarded(self, count: int, dtype: torch.dtype) -> Tensor:
        guard, alignment = _GUARD // dtype.itemsize, 256 // dtype.itemsize
        storage = torch.empty(count + 2 * guard + alignment, dtype=dtype)
        # Aligned as torch aligns device memory.
        first = guard + -(storage.data_ptr() // dtype.itemsize + guard) % alignment
        result = storage[first : first + count]
        self._storage.append(storage)
        self._library.emulation_buffer(
            ctypes.c_void_p(result.data_ptr()),
            ctypes.c_long(count * dtype.itemsize),
            ctypes.c_long(_GUARD // 2),
        )
        return result
