"""Builds the compiled backends; everything else about the package stands in pyproject.toml.

``pip install .`` builds what this machine can build and leaves the rest out, saying why.
``python setup.py build_ext --inplace`` has to build everything, or fails.

Environment: CIN_FAST_BUILD=0 builds nothing, CIN_FAST_BUILD=1 has to build everything;
CIN_FAST_SANITIZE=1 adds the address and undefined-behaviour sanitizers; MAX_JOBS (default 2) and
CXX as usual.
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("CIN_FAST_BUILD", "")
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
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
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


# Name in the build record -> what makes the extension. The CUDA backend (cin_fast._C) joins here.
EXTENSIONS = {"cpu": cpu_extension}


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
        if self.required and self.reasons:
            raise SystemExit("cin_fast: cannot build " + describe(self.reasons))
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

    def build_extension(self, ext: Extension) -> None:
        name = next(name for name, planned in PLANNED.items() if planned is ext)
        ext.optional = not self.required
        try:
            super().build_extension(ext)
        except Exception as error:
            if self.required:
                raise SystemExit(f"cin_fast: building {ext.name} failed: see above") from error
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.reasons[name] = f"the compiler failed ({type(error).__name__})"

    def write_record(self) -> None:
        """What was built and why the rest was not, for cin_fast.dispatch."""
        record = {"torch": TORCH, **{name: name not in self.reasons for name in EXTENSIONS}}
        text = json.dumps({**record, "reasons": self.reasons}, indent=2) + "\n"
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
