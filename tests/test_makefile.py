"""On a machine that lacks something, `make` says so in one line that names the fix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = ("sh", "awk", "ls", "env", "mkdir", "rm", "touch", "make", "cat")
DF = """#!/bin/sh
echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'
echo '/dev/x 99999999 0 {kilobytes} 1% /'
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH of its own on which everything is there: python3, g++ and 20 GB of disk."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found is None:
            pytest.skip(f"needs {tool} on PATH")
        (path / tool).symlink_to(found)
    script(path / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script(path / "g++", "#!/bin/sh\n")
    script(path / "df", DF.format(kilobytes=20_000_000))
    return path


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def too_old(machine: Path) -> None:
    script(machine / "python3", '#!/bin/sh\ncase "$2" in *print*) echo 3.9;; *) exit 1;; esac\n')


def broken(machine: Path) -> None:
    script(machine / "python3", "#!/bin/sh\necho 'Traceback (most recent call last)' >&2\nexit 1\n")


def no_ensurepip(machine: Path) -> None:
    script(
        machine / "python3",
        '#!/bin/sh\ncase "$2" in *ensurepip*) echo "Traceback: no ensurepip" >&2; exit 1;; esac\n'
        f'exec "{sys.executable}" "$@"\n',
    )


def little_disk(machine: Path) -> None:
    script(machine / "df", DF.format(kilobytes=3_000_000))


MISSING = [
    pytest.param(lambda m: (m / "python3").unlink(), r"python3 is not on PATH.*3\.10", id="python"),
    pytest.param(broken, r"does not run.*PYTHON=", id="broken python"),
    pytest.param(too_old, r"Python 3\.9, and 3\.10 or later is needed.*PYTHON=", id="old python"),
    pytest.param(no_ensurepip, r"apt-get install python3\.\d+-venv", id="venv"),
    pytest.param(
        lambda m: (m / "g++").unlink(), r"C\+\+ compiler.*apt-get install g\+\+", id="g++"
    ),
    pytest.param(little_disk, r"2929 MB are free .* 10000 MB", id="disk"),
]


def run(*command: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={"PATH": str(path)}, cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_a_complete_machine_passes_in_silence(repository: Path, machine: Path) -> None:
    preflight = str(repository / "scripts" / "preflight.sh")
    result = run("sh", preflight, "python3", path=machine, cwd=machine.parent)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(("remove", "message"), MISSING)
def test_what_is_missing_is_named_in_one_line(
    repository: Path, machine: Path, remove: object, message: str
) -> None:
    assert callable(remove)
    remove(machine)
    preflight = str(repository / "scripts" / "preflight.sh")
    result = run("sh", preflight, "python3", path=machine, cwd=machine.parent)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("cin_fast: ")
    assert re.search(message, line)


def test_an_installed_checkout_needs_no_room(repository: Path, machine: Path) -> None:
    little_disk(machine)
    torch = machine.parent / ".venv" / "lib" / "python3.11" / "site-packages" / "torch"
    torch.mkdir(parents=True)
    (torch / "version.py").touch()
    preflight = str(repository / "scripts" / "preflight.sh")
    result = run("sh", preflight, "python3", path=machine, cwd=machine.parent)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("target", ["install", "test", "demo"])
def test_make_stops_before_it_begins(repository: Path, machine: Path, target: str) -> None:
    (machine / "g++").unlink()
    checkout = machine.parent / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "setup.py"):
        shutil.copy(repository / name, checkout)
    shutil.copy(repository / "scripts" / "preflight.sh", checkout / "scripts")
    result = run("make", target, path=machine, cwd=checkout)
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if not line.startswith("make: ")]
    (line,) = ours
    assert line.startswith("cin_fast: no C++ compiler")
    assert not (checkout / ".venv").exists()


def test_help_lists_every_target(repository: Path) -> None:
    text = (repository / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    result = subprocess.run(
        ["make"], cwd=repository, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True
    )
    listed = re.findall(r"^  make ([a-z-]+) +\S", result.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(targets.split())


def test_the_lock_names_versions_and_no_machine(repository: Path) -> None:
    lines = (repository / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    for line in pins:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+!]*( ; .+)?", line), line
    assert not [line for line in lines if "://" in line or "index" in line]
