"""Makes Triton's interpreter right in bfloat16, and its products free of their summing order.

There a bfloat16 is its bit pattern in a uint16: ``tl.dot`` multiplies the patterns, and a cast from
float32 cuts digits off instead of rounding; ``tl.fma`` rounds twice. All are replaced before a
kernel runs. Products are summed in float64 and rounded once: how a GPU orders its sums is nothing
an interpreter can show, so what is left to be measured is the error of everything else.

It also patches ``triton.language`` for each call of a device function, which took half of its time:
here once a module.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_NAN = 0x7FC0


def widened(patterns: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (np.ascontiguousarray(patterns).astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns, rounded to the nearest even."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(_NAN), rounded)


def repair() -> None:
    """Replace the interpreter's product, casts and patches; called again, it changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_bfloat16_is_right", False):
        return
    cast, fp_to_fp, fma = builder.cast_impl, builder.create_fp_to_fp, builder.create_fma
    handle = interpreter.TensorHandle

    def wide(value: Any) -> Any:
        if value.dtype.scalar == tl.bfloat16:
            return handle(widened(value.data), tl.float32)
        return value

    def create_dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        product = wide(a).data.astype(np.float64) @ wide(b).data.astype(np.float64)
        return handle((product + total.data).astype(total.data.dtype), total.dtype.scalar)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if a.dtype.scalar != tl.float32:
            return fma(self, a, b, c)
        exact = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data
        return handle(exact.astype(np.float32), tl.float32)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            return wide(source) if after == tl.float32 else cast(self, wide(source), target)
        if after == tl.bfloat16 and before != tl.bfloat16:
            as_float = source if before == tl.float32 else cast(self, source, tl.float32)
            return handle(narrowed(as_float.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return self.cast_impl(source, target)
        return fp_to_fp(self, source, target, rounding)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_to_fp, builder.create_fma = create_fp_to_fp, create_fma
    builder._bfloat16_is_right = True
    _patch_once()


def _patch_once() -> None:
    """A process that interprets compiles nothing: what was patched may stay so."""
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
