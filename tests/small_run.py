"""A run that takes a second or two: its options, and how to start several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SMALL = {
    "--dataset": "folder",
    "--image-size": "32",
    "--backbone": "resnet18",
    "--weights": "none",
    "--classes-per-batch": "2",
    "--images-per-class": "2",
    "--workers": "0",
    "--embedding-dim": "8",
    "--device": "cpu",
}


def arguments(images, output, **changes):
    """SMALL on a folder of images, with changes."""
    options = {**SMALL, "--data-root": str(images), "--output": str(output)}
    options |= {"--" + name.replace("_", "-"): str(value) for name, value in changes.items()}
    return [part for option in options.items() for part in option]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(module, *arguments):
    """A module under torchrun with two processes of a thread each."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
        f"--master-port={free_port()}", "-m", module, *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command,
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
