"""What an install consists of, and that it says truthfully what it could not build."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from cin_fast import schemas

SOURCES = ("cin_fast", "kernels", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE")
COMMANDS = {
    "train": "train",
    "data": "data.cli",
    "eval": "evaluate",
    "predict": "predict",
    "visualize": "visualize",
    "reproduce": "reproduce",
    "export": "export",
}
CHIPS = [
    ("", ["80", "90a"]),
    ("9.0", ["90a"]),
    ("7.5 8.6+PTX;9.0a, 10.0", ["86", "90a", "100"]),
    ("Hopper", "expected e.g. 8.0;9.0a, found Hopper"),
    ("7.0;7.5", "needs a chip from 8.0 on, found 7.0;7.5"),
]
TINY = 'extern "C" int cin_fast_tiny() { return 1; }\n'


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """A copy of the sources, and a stale build in place that nothing may pick up."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in SOURCES:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, copy)
    (copy / "kernels").mkdir(exist_ok=True)
    (copy / "kernels" / "__init__.py").touch()
    (copy / "README.md").write_text("# cin_fast\n")
    (copy / "cin_fast" / "_cpu.abi3.so").write_text("stale")
    (copy / "cin_fast" / "_build.json").write_text('{"torch": "0.0", "cpu": true}')
    return copy


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CIN_FAST_", "PYTHONPATH"))}
    # Minutes of nvcc would say nothing more; test_cuda_compile.py compiles the kernels.
    clean["CIN_FAST_CUDA"] = "0"
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=clean | env, capture_output=True, text=True
    )


def build_backend(checkout: Path, what: str, **env: str) -> tuple[Path, str]:
    """What pip runs, without its download of a build environment: (archive, output)."""
    code = f"import setuptools.build_meta as b; print('built:', b.build_{what}('out'))"
    result = python("-c", code, cwd=checkout, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return checkout / "out" / result.stdout.rsplit("built: ", 1)[1].strip(), result.stdout


def build_wheel(checkout: Path, **env: str) -> tuple[dict[str, bytes], Path, str]:
    """The wheel's files, the folder they are unpacked in, and the line that setup.py prints."""
    wheel, output = build_backend(checkout, "wheel", **env)
    site = checkout.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        files = {name: archive.read(name) for name in archive.namelist()}
    (said,) = [line for line in output.splitlines() if line.startswith("cin_fast: ")]
    return files, site, f"{wheel.name} {said}"


def only_source(checkout: Path, text: str) -> None:
    """One C++ file instead of the kernels: what is tested is what is said about its build."""
    shutil.rmtree(checkout / "csrc" / "cpu")
    (checkout / "csrc" / "cpu").mkdir()
    (checkout / "csrc" / "cpu" / "tiny.cpp").write_text(text)


def test_pure_wheel_is_complete_and_says_what_it_lacks(checkout: Path) -> None:
    files, site, said = build_wheel(checkout, CIN_FAST_BUILD="0")
    top = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert top == {"cin_fast"}
    modules = {p.relative_to(checkout).as_posix() for p in (checkout / "cin_fast").rglob("*.py")}
    kernels = {
        f"cin_fast/{p.relative_to(checkout).as_posix()}"
        for p in (checkout / "kernels").rglob("*.py")
    }
    assert kernels
    assert {"cin_fast/py.typed", *modules, *kernels} <= files.keys()
    assert not [name for name in files if name.endswith(".so")]
    assert "py3-none-any" in said
    assert "pure Python only; not built: cpu (CIN_FAST_BUILD=0)" in said

    info = python("-m", "cin_fast.info", cwd=site.parent, PYTHONPATH=str(site))
    assert info.returncode == 0, info.stderr
    (line,) = [line for line in info.stdout.splitlines() if line.split()[:1] == ["cpu"]]
    assert "off" in line
    assert "CIN_FAST_BUILD=0" in line


def test_wheel_with_the_extension(checkout: Path) -> None:
    import torch

    only_source(checkout, TINY)
    files, _, said = build_wheel(checkout)
    (library,) = [name for name in files if name.endswith(".so")]
    assert files[library] != b"stale"
    assert "cp310-abi3" in said
    record = json.loads(files["cin_fast/_build.json"])
    assert record == {
        "torch": str(torch.__version__),
        "cpu": True,
        "cuda": False,
        "reasons": {"cuda": "CIN_FAST_CUDA=0"},
        "schemas": {f"cpu_{stem}": schema for stem, schema in schemas.COMPILED["cpu"].items()},
    }
    assert f"built cpu for torch {torch.__version__}" in said


@pytest.mark.parametrize(("listed", "chips"), CHIPS)
def test_chips_to_build_for(
    listed: str, chips: list[str] | str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(repository)
    # Both are set on the way.
    for name in ("PATH", "MAX_JOBS"):
        monkeypatch.setenv(name, os.environ.get(name, "2"))
    for name, value in (("CIN_FAST_BUILD", "0"), ("TORCH_CUDA_ARCH_LIST", listed)):
        monkeypatch.setenv(name, value)
    script = runpy.run_path("setup.py")
    if isinstance(chips, list):
        assert script["cuda_chips"]() == chips
        return
    with pytest.raises(script["CannotBuildError"], match=re.escape(chips)):
        script["cuda_chips"]()


@pytest.mark.parametrize(
    ("source", "env", "reason"),
    [
        pytest.param(TINY, {"CXX": "no-such-compiler"}, "no-such-compiler", id="no compiler"),
        pytest.param("#error broken\n", {}, "the compiler failed", id="broken source"),
    ],
)
def test_install_survives_what_a_request_does_not(
    checkout: Path, source: str, env: dict[str, str], reason: str
) -> None:
    only_source(checkout, source)
    files, _, said = build_wheel(checkout, **env)
    assert reason in said
    assert not [name for name in files if name.endswith(".so")]
    record = json.loads(files["cin_fast/_build.json"])
    assert record["cpu"] is False
    assert reason in record["reasons"]["cpu"]

    asked = python("setup.py", "build_ext", "--inplace", cwd=checkout, **env)
    assert asked.returncode != 0
    last = asked.stderr.strip().splitlines()[-1]
    assert last.startswith("cin_fast: ")
    assert "Traceback" not in asked.stderr


def test_source_archive_builds_a_wheel(checkout: Path) -> None:
    archive, _ = build_backend(checkout, "sdist", CIN_FAST_BUILD="0")
    with tarfile.open(archive) as tar:
        tar.extractall(checkout.parent / "unpacked", filter="data")
    (tree,) = (checkout.parent / "unpacked").iterdir()
    ours = {p.relative_to(checkout).as_posix() for p in (checkout / "csrc").rglob("*.*")}
    assert ours <= {p.relative_to(tree).as_posix() for p in tree.rglob("*")}
    assert not list(tree.rglob("*.so"))
    files, _, _ = build_wheel(tree, CIN_FAST_BUILD="0")
    assert "cin_fast/py.typed" in files


def test_import_touches_neither_triton_nor_a_device(tmp_path: Path, repository: Path) -> None:
    code = """
import sys, torch
def touched(*args, **kwargs): raise AssertionError("a device was touched")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = touched
before = set(sys.modules)
import cin_fast
print(sorted(n for n in set(sys.modules) - before if n.split(".")[0] in ("triton", "kernels")))
"""
    result = python("-c", code, cwd=tmp_path, PYTHONPATH=str(repository))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def has_main(module: Path) -> bool:
    return module.exists() and "\ndef main(" in module.read_text()


def test_every_command_is_listed_and_has_a_main(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text()
    section = text.split("[project.scripts]")[1].split("\n[")[0]
    listed = dict(re.findall(r'^cin-fast-([a-z]+) = "([a-z_.]+:main)"$', section, re.MULTILINE))
    there = {
        command: f"cin_fast.{module}:main"
        for command, module in COMMANDS.items()
        if has_main(repository / "cin_fast" / f"{module.replace('.', '/')}.py")
    }
    assert listed == there
    for target in listed.values():
        assert callable(importlib.import_module(target.split(":")[0]).main)
