"""What the compiler makes of every kernel: registers, spills, shared memory, instructions.

The kernels are compiled ahead of time with the compiler that Triton brings along; no GPU is needed.
``python -m cin_fast.kernels.report --help`` says what the columns mean.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cin_fast.kernels.configs import AMPERE, HOPPER, HOPPER_CONFIGS, Config, Maps
from cin_fast.kernels.plan import Launch, Operator, Precision, plan

# Bytes of shared memory that one block may have, by compute capability.
SHARED_LIMIT = {80: 166_912, 90: 232_448}
_SHARED_OF_A_MULTIPROCESSOR = {80: 167_936, 90: 233_472}
_SHARED_RESERVED = 1024
_REGISTERS_OF_A_MULTIPROCESSOR = 65_536
_WARPS_OF_A_MULTIPROCESSOR = 64
# Bytes that a thread may spill where a row was faster than any without spills, by a wide margin
# (H100, bf16, C 2048 L 196, triton 3.6). The first is without spills there, not with triton 3.9.
SPILLS: dict[tuple[str, Config], int] = {
    # 508 us; the rows of sm_80 take 2649.
    ("sci_backward", HOPPER_CONFIGS["sci_backward", "half", "dense"]): 48,
    # 2118 us; the rows of sm_80 take 18817.
    ("cci_backward", HOPPER_CONFIGS["cci_backward", "half", "dense"]): 376,
    # 631 us; the fastest without spills takes 1935, those of sm_80 10567.
    ("cci_backward", HOPPER_CONFIGS["cci_backward", "half", "thin"]): 8,
}
OPERATORS: tuple[Operator, ...] = ("sci", "sci_backward", "cci", "cci_backward")

Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Shape:
    """A call's channels, positions and columns of v (None: v is x)."""

    channels: int
    positions: int
    columns: int | None = None

    def __str__(self) -> str:
        v = "v = x" if self.columns is None else f"K {self.columns}"
        return f"C {self.channels} L {self.positions} {v}"


# A shape of each class that the tuning table knows: rows held and rows met in chunks, a thin v, and
# float32.
CALLS: tuple[tuple[Dtype, Precision, Shape], ...] = (
    ("bf16", "ieee", Shape(2048, 196)),
    ("bf16", "ieee", Shape(2048, 196, 9)),
    ("bf16", "ieee", Shape(512, 784)),
    ("fp32", "ieee", Shape(2048, 196)),
    ("fp32", "tf32", Shape(2048, 196)),
)
# What other networks give.
MORE: tuple[tuple[Dtype, Precision, Shape], ...] = (
    ("bf16", "ieee", Shape(2048, 49)),
    ("bf16", "ieee", Shape(2048, 49, 9)),
    ("bf16", "ieee", Shape(2048, 361)),
    ("bf16", "ieee", Shape(512, 4096)),
    ("bf16", "ieee", Shape(512, 784, 9)),
    ("bf16", "ieee", Shape(1001, 197)),
    ("bf16", "ieee", Shape(1001, 197, 1)),
    ("bf16", "ieee", Shape(2048, 196, 64)),
    ("fp16", "ieee", Shape(2048, 196)),
    ("fp16", "ieee", Shape(2048, 196, 9)),
    ("fp32", "ieee", Shape(2048, 196, 9)),
    ("fp32", "tf32", Shape(2048, 196, 9)),
    ("fp32", "ieee", Shape(512, 4096)),
    ("fp32", "ieee", Shape(1001, 197)),
)


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one chip."""

    chip: int
    dtype: Dtype
    shape: Shape
    launch: Launch

    @property
    def key(self) -> str:
        """Equal for jobs that compile to the same code."""
        launch = self.launch
        return f"{self.chip} {self.dtype} {launch.kernel} {launch.constants} {launch.config}"

    def __str__(self) -> str:
        precision = f" {self.launch.constants['PRECISION']}" if self.dtype == "fp32" else ""
        return f"{self.launch.kernel} {self.dtype}{precision} {self.shape} sm_{self.chip}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job."""

    job: Job
    registers: int
    stack: int
    local: int
    shared: int
    instructions: int
    matrix: int
    hgmma: int
    wgmma: int
    async_copies: int

    @property
    def spills(self) -> bool:
        """Whether anything lives in local memory."""
        return bool(self.stack or self.local)

    @property
    def problem(self) -> str:
        """Why the kernel is not as it should be: "" if it is."""
        launch = self.job.launch
        if self.shared > SHARED_LIMIT[self.job.chip]:
            return "too much shared memory"
        allowed = SPILLS.get((launch.kernel, launch.config), 0)
        return "spills" if self.stack > allowed or (self.local and not allowed) else ""

    @property
    def share(self) -> float:
        """Of all instructions, those that multiply matrices."""
        return self.matrix / self.instructions

    @property
    def warps(self) -> int:
        """How many warps a multiprocessor holds at once."""
        each = self.job.launch.config.warps
        registers = each * 32 * (-(-self.registers // 8) * 8)
        shared = _SHARED_OF_A_MULTIPROCESSOR[self.job.chip] // (self.shared + _SHARED_RESERVED)
        blocks = min(_REGISTERS_OF_A_MULTIPROCESSOR // registers, shared)
        return min(blocks * each, _WARPS_OF_A_MULTIPROCESSOR)


def jobs(
    chips: Sequence[int] = (AMPERE, HOPPER), calls: Iterable[tuple[Dtype, Precision, Shape]] = CALLS
) -> list[Job]:
    """Every kernel that the calls take, each code once."""
    found: dict[str, Job] = {}
    for dtype, precision, shape in calls:
        itemsize = 4 if dtype == "fp32" else 2
        columns = shape.positions if shape.columns is None else shape.columns
        maps = Maps(20, shape.channels, shape.positions, columns, shape.columns is None, itemsize)
        for operator, chip in itertools.product(OPERATORS, chips):
            for launch in plan(operator, maps, chip, precision):
                job = Job(chip, dtype, shape, launch)
                found.setdefault(job.key, job)
    return list(found.values())


def signature(names: Iterable[str], dtype: Dtype) -> dict[str, str]:
    """Triton's types of a kernel's run-time arguments."""
    wide = "*fp64" if dtype == "fp32" else "*fp32"
    types = {
        **dict.fromkeys(("row_max", "row_sum", "eta"), "*fp32"),
        **dict.fromkeys(("delta", "deta"), wide),
        "partner": "*i64",
        "scale": "fp32",
    }
    return {name: types.get(name, f"*{dtype}") for name in names}


def build(job: Job) -> Any:
    """Triton's compiled kernel, made without a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cin_fast.kernels.launch import KERNELS

    kernel, constants = KERNELS[job.launch.kernel], job.launch.constants
    names = kernel.arg_names
    types = signature((name for name in names if name not in constants), job.dtype)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # torch hands out memory in multiples of 16 bytes.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, of in types.items()
            if of.startswith("*")
        },
    )
    target = GPUTarget("cuda", job.chip, 32)
    return triton.compile(source, target=target, options=job.launch.config.options)


def compiled(job: Job) -> Compiled:
    """Compile a job and read its machine code."""
    result = build(job)
    code = _disassembled(result.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", code)
    assert usage, code[:2000]
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code)
    operations = [name for name in operations if name != "NOP"]

    def count(*stems: str) -> int:
        return sum(name.split(".")[0] in stems for name in operations)

    return Compiled(
        job=job,
        registers=int(usage[1]),
        stack=int(usage[2]),
        local=count("LDL", "STL"),
        shared=result.metadata.shared,
        instructions=len(operations),
        matrix=count("HMMA", "HGMMA"),
        hgmma=count("HGMMA"),
        wgmma=result.asm["ptx"].count("wgmma.mma_async"),
        async_copies=count("LDGSTS"),
    )


def compile_all(wanted: Sequence[Job], processes: int = 2) -> list[Compiled]:
    """All jobs, in order, in some processes."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: nothing is compiled (unset it)")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(compiled, wanted))


def table(results: Iterable[Compiled]) -> str:
    """The report as a Markdown table."""
    heads = (
        *("kernel", "type", "shape", "chip", "rows x columns", "warps", "stages", "registers"),
        *("spills", "shared memory", "warps at once", "matrix"),
    )
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for one in results:
        job, config = one.job, one.job.launch.config
        precision = job.launch.constants["PRECISION"]
        dtype = f"{job.dtype} {precision}" if job.dtype == "fp32" else job.dtype
        spills = f"{one.stack} bytes" if one.spills else "0"
        cells = (
            *(job.launch.kernel, dtype, job.shape, f"sm_{job.chip}", f"{config.bm} x {config.bn}"),
            *(config.warps, config.stages, one.registers, spills, f"{one.shared:,}", one.warps),
            f"{one.share:.1%}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _disassembled(binary: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        commands = [[str(tool), flag, file.name] for flag in ("-res-usage", "-sass")]
        outputs = [subprocess.run(c, capture_output=True, text=True, check=True) for c in commands]
    return "".join(output.stdout + output.stderr for output in outputs)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a kernel has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m cin_fast.kernels.report",
        description="Compile the Triton kernels for some chips, without a GPU, and print what each "
        "takes. Exit status 1 if one exceeds the chip's shared memory, or spills and is none of "
        "the few that were measured to be the fastest all the same.",
        epilog="Columns: rows x columns of the tile that a block works on; registers a thread; "
        "bytes spilled to memory; bytes of shared memory a block (at most 166,912 on sm_80, "
        "232,448 on sm_90); warps that a multiprocessor holds at once with those (of 64); matrix: "
        "the share of all instructions that multiply matrices. None of it is a measured speed.",
    )
    parser.add_argument(
        "--target", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=[80, 90],
        help="compute capabilities (80 90)",
    )  # fmt: skip
    parser.add_argument("--more", action="store_true", help="shapes of other networks, too")
    parser.add_argument("--kernel", nargs="+", help="only these, e.g. sci_forward cci_backward")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp16", "fp32"], help="only these")
    parser.add_argument("--processes", type=int, default=2, help="compilers at once (2)")
    options = parser.parse_args(arguments)
    listed = (*CALLS, *MORE) if options.more else CALLS
    calls = [call for call in listed if not options.dtype or call[0] in options.dtype]
    wanted = [
        job
        for job in jobs(options.target, calls)
        if not options.kernel or job.launch.kernel in options.kernel
    ]
    results = compile_all(wanted, options.processes)
    print(table(results))
    wrong = [one for one in results if one.problem]
    for one in wrong:
        print(f"{one.job}: {one.problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
