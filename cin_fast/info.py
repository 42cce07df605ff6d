"""``python -m cin_fast.info``: versions, devices, and each backend with the reason it is off."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import cin_fast
from cin_fast import command, dispatch


def versions() -> dict[str, str]:
    """Versions of everything that decides a number, ``"not installed"`` where it is missing."""
    found = {"cin_fast": cin_fast.__version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "triton", "timm"):
        present = importlib.util.find_spec(name) is not None
        found[name] = metadata.version(name) if present else "not installed"
    found["cuda (torch)"] = torch.version.cuda or "none"
    return found


def device_name() -> str:
    """The machine in words: the GPU, or the CPU with its threads and vector capability."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {capability}"


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of the source that runs, ``-dirty`` if changed; "unknown" outside git."""
    here = Path(__file__).resolve().parent
    # Installed, it may lie in an environment inside another project's repository.
    if not (here.parent / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def report() -> str:
    """What :func:`main` prints."""
    lines = [f"{name:14}{version}" for name, version in versions().items()]
    lines += [f"{'device':14}{device_name()}", ""]
    for backend in dispatch.BACKENDS:
        reason = dispatch.unavailable(backend)
        lines.append(f"{backend:14}{'off: ' + reason if reason else 'on'}")
    return "\n".join(lines)


def main() -> int:
    """The command; prints errors as one line and returns 2 for them."""

    def body() -> int:
        print(report(), flush=True)
        return 0

    return command.run("python -m cin_fast.info", body)


if __name__ == "__main__":
    sys.exit(main())
