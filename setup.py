"""Builds the compiled backends; everything else about the package stands in pyproject.toml.

``pip install .`` builds what this machine can build and leaves the rest out, saying why.
``python setup.py build_ext --inplace`` fails where that does not build; the CUDA kernels, which
need nvcc and no GPU, it leaves out where there is no nvcc, unless they are asked for.

Environment: CIN_FAST_BUILD=0 builds nothing, CIN_FAST_BUILD=1 has to build everything;
CIN_FAST_CUDA=0 leaves the CUDA kernels out, CIN_FAST_CUDA=1 has to build them;
TORCH_CUDA_ARCH_LIST (default 8.0;9.0a) names their chips, CUDA_HOME the toolkit;
CIN_FAST_SANITIZE=1 adds the address and undefined-behaviour sanitizers; MAX_JOBS (default 2) and
CXX as usual.
"""

import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("CIN_FAST_BUILD", "")
CUDA = os.environ.get("CIN_FAST_CUDA", "")
SANITIZE = os.environ.get("CIN_FAST_SANITIZE") == "1"
os.environ.setdefault("MAX_JOBS", "2")
os.chdir(Path(__file__).resolve().parent)
with contextlib.suppress(ImportError):  # its binary is off PATH in an environment not activated
    import ninja

    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")

TORCH = None
NO_TORCH = "CIN_FAST_BUILD=0" if BUILD == "0" else ""
BuildExtension = build_ext
if not NO_TORCH:
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        TORCH = str(torch.__version__)
    except ModuleNotFoundError as error:
        # pip builds in an environment of its own, and torch is too large to be asked for there.
        NO_TORCH = f"{error} where it builds (pip install --no-build-isolation .)"
    except Exception as error:  # a broken torch raises OSError and worse; an install survives it
        NO_TORCH = f"torch does not import ({error})"


class CannotBuildError(Exception):
    """Why one extension cannot be built on this machine, in one line."""


def cpu_extension() -> Extension:
    """``cin_fast._cpu``: at::parallel_for and ATen's vectors, so it serves only its own torch."""
    if NO_TORCH:
        raise CannotBuildError(NO_TORCH)
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not shutil.which(compiler):
        raise CannotBuildError(f"no C++ compiler: {compiler} is not on PATH (apt-get install g++)")
    # No -march: the kernels choose their instructions when they run, not where they are built.
    # OpenMP is named to the compiler alone: at run time torch's own copy serves, never a second.
    # No contraction: the kernels say where a product and a sum round once, and where twice.
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-ffp-contract=off"]
    # Apple's compiler hides the option, and finds omp.h among torch's headers.
    openmp = {"linux": ["-fopenmp"], "darwin": ["-Xpreprocessor", "-fopenmp"]}.get(sys.platform, [])
    sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if SANITIZE else []
    return CppExtension(
        "cin_fast._cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        include_dirs=[str(Path("csrc/cpu").resolve())],
        extra_compile_args=[*flags, *openmp, *sanitizers, *(["-O1", "-g"] if SANITIZE else [])],
        extra_link_args=sanitizers,
        # No Python in it (torch.ops.load_library loads it): neither tied to an interpreter nor in
        # need of its headers.
        py_limited_api=True,
    )


def cuda_home() -> Path:
    """The toolkit: the folder that holds nvcc, its headers and the static runtime."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        # An nvcc on PATH may be a wrapper far from its toolkit, so this comes last.
        named.append(str(Path(nvcc).resolve().parent.parent))
    for folder in map(Path, filter(None, named)):
        needed = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a")
        if all((folder / name).exists() for name in needed):
            return folder
    raise CannotBuildError("no CUDA toolkit: set CUDA_HOME to a folder that holds bin/nvcc")


def cuda_extension() -> Extension:
    """``cin_fast._C``: over torch's stable ABI, so one binary serves every torch from 2.11 on."""
    if NO_TORCH:
        raise CannotBuildError(NO_TORCH)
    if CUDA == "0":
        raise CannotBuildError("CIN_FAST_CUDA=0")
    if SANITIZE:
        raise CannotBuildError("CIN_FAST_SANITIZE=1 is for the CPU kernels")
    if sys.platform != "linux":
        raise CannotBuildError(f"it builds on Linux, this is {sys.platform}")
    cuda_chips()
    home = cuda_home()
    return CppExtension(
        "cin_fast._C",
        ["csrc/cuda/binding.cpp"],
        include_dirs=[str(home / "include")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args=["-O2", "-std=c++20", "-fvisibility=hidden", "-Wall"],
        extra_objects=[str(home / "lib64" / "libcudart_static.a")],
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        libraries=["rt", "dl", "pthread"],
        py_limited_api=True,
    )


def cuda_chips() -> list[str]:
    """TORCH_CUDA_ARCH_LIST's, as nvcc names them, less those that the kernels do not run on."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "8.0;9.0a"
    names = [name.removesuffix("+PTX") for name in re.split(r"[;,\s]+", listed) if name]
    if not all(re.fullmatch(r"\d+\.\d[af]?", name) for name in names):
        raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST: expected e.g. 8.0;9.0a, found {listed}")
    # wgmma is in 9.0a alone; what is compiled for 9.0 could not take its place.
    chips = ["9.0a" if name == "9.0" else name for name in names if float(name[:3]) >= 8]
    if not chips:
        raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST: needs a chip from 8.0 on, found {listed}")
    return [name.replace(".", "") for name in dict.fromkeys(chips)]


def nvcc_commands(folder: Path) -> dict[Path, list[str]]:
    """What compiles the kernels for every chip: object -> command, a file of kernels each."""
    chips = cuda_chips()
    targets = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    # Chips that nothing here names compile the plainest version when they first meet it.
    plainest = min(chips, key=lambda chip: int(chip.rstrip("af")))
    targets.append(f"-gencode=arch=compute_{plainest},code=compute_{plainest}")
    flags = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    if "90a" in chips:  # wgmma exists there and nowhere else
        flags.append("-DCIN_FAST_SM90A")
    return {
        folder / f"{source.name}.o": [
            *(str(cuda_home() / "bin" / "nvcc"), "-c", str(source), *flags, *targets),
            *("-o", str(folder / f"{source.name}.o")),
        ]
        for source in sorted(Path("csrc/cuda").glob("*.cu"))
    }


def compile_kernels(folder: Path) -> list[str]:
    """Runs nvcc on what changed; returns all objects. Beside each lies ptxas's report."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*Path("csrc/cuda").glob("*.cuh"), *Path("csrc/cuda").glob("*.h")]
    newest_header = max(path.stat().st_mtime for path in headers)
    commands = nvcc_commands(folder)

    def compile_one(item: tuple[Path, list[str]]) -> None:
        target, command = item
        report = target.with_suffix(".log")
        same = report.exists() and report.read_text().startswith(" ".join(command) + "\n")
        newest = max(newest_header, Path(command[2]).stat().st_mtime)
        if target.exists() and same and target.stat().st_mtime > newest:
            return
        print(f"cin_fast: {' '.join(command)}", flush=True)
        started = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"nvcc failed on {command[2]}:\n{result.stderr[-4000:]}")
        report.write_text(" ".join(command) + "\n" + result.stderr)
        print(f"cin_fast: {target.name} after {time.monotonic() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(max_workers=int(os.environ["MAX_JOBS"])) as pool:
        list(pool.map(compile_one, commands.items()))
    return [str(target) for target in commands]


# Name in the build record -> what makes the extension.
EXTENSIONS = {"cpu": cpu_extension, "cuda": cuda_extension}


def plan() -> tuple[dict[str, Extension], dict[str, str]]:
    """The extensions to build, and why each other one is not."""
    extensions, reasons = {}, {}
    for name, make in EXTENSIONS.items():
        try:
            extensions[name] = make()
        except CannotBuildError as error:
            reasons[name] = str(error)
    return extensions, reasons


PLANNED, REASONS = plan()


class Build(build):
    """Runs build_ext even when there is nothing to compile: it writes the build record."""

    sub_commands = [("build_py", None), ("build_ext", None)]  # noqa: RUF012


class BuildExtensions(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # Objects of another torch, or with other flags, are never picked up.
        self.build_temp += f"-torch{TORCH}" + ("-sanitize" if SANITIZE else "")

    def run(self) -> None:
        self.required = BUILD == "1" or "build_ext" in self.distribution.commands
        self.reasons = dict(REASONS)
        missing = {name: why for name, why in self.reasons.items() if self.is_required(name)}
        if missing:
            raise SystemExit("cin_fast: cannot build " + describe(missing))
        if self.extensions:
            super().run()
        if not (BUILD == "0" and self.inplace):
            self.write_record()
        built = [name for name in EXTENSIONS if name not in self.reasons]
        print(
            f"cin_fast: built {', '.join(built) or 'pure Python only'}"
            + (f" for torch {TORCH}" if built else "")
            + (f"; not built: {describe(self.reasons)}" if self.reasons else "")
        )

    def is_required(self, name: str) -> bool:
        """A machine may do without nvcc, unless the user says otherwise."""
        if name == "cuda" and name in REASONS:
            return CUDA == "1" or (BUILD == "1" and CUDA != "0")
        return self.required

    def build_extension(self, ext: Extension) -> None:
        name = next(name for name, planned in PLANNED.items() if planned is ext)
        ext.optional = not self.is_required(name)
        try:
            if name == "cuda":
                kernels = compile_kernels(Path(self.build_temp) / "csrc" / "cuda")
                ext.extra_objects = kernels + ext.extra_objects
            super().build_extension(ext)
        except Exception as error:
            if self.is_required(name):
                print(error, file=sys.stderr)
                raise SystemExit(f"cin_fast: building {ext.name} failed: see above") from error
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.reasons[name] = f"the compiler failed ({type(error).__name__})"

    def write_record(self) -> None:
        """What was built, for which schemas, and why the rest was not, for cin_fast.dispatch."""
        built = {name: name not in self.reasons for name in EXTENSIONS}
        compiled = runpy.run_path("cin_fast/schemas.py")["COMPILED"]
        schemas = {
            f"{name}_{stem}": schema
            for name in EXTENSIONS
            if built[name]
            for stem, schema in compiled[name].items()
        }
        record = {"torch": TORCH, **built, "reasons": self.reasons, "schemas": schemas}
        text = json.dumps(record, indent=2) + "\n"
        folder = Path("." if self.inplace else self.build_lib) / "cin_fast"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(text)


def describe(reasons: dict[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in reasons.items())


packages = find_packages(include=["cin_fast", "cin_fast.*"])
kernels = find_packages(include=["kernels", "kernels.*"])
setup(
    # kernels/ lives in the package: the top-level name `kernels` belongs to another project.
    packages=[*packages, *(f"cin_fast.{name}" for name in kernels)],
    package_dir={"cin_fast.kernels": "kernels"},
    ext_modules=list(PLANNED.values()),
    cmdclass={"build": Build, "build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if PLANNED else {},
)
