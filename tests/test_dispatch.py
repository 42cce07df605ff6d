"""Which backend runs, and what is said of those that cannot."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cin_fast
from cin_fast import dispatch, info, schemas
from cin_fast.info import report
from cin_fast.nn import CCI


@pytest.fixture
def x():
    return torch.zeros(1, 2, 3)


def test_reference_runs_anywhere(x):
    for t in (x, x.double(), torch.zeros(1, 2, 3, device="meta")):
        assert dispatch.why_not(t, "reference") == ""


def test_float64_is_for_the_reference(x, monkeypatch):
    monkeypatch.delenv("CIN_FAST_BACKEND", raising=False)
    assert dispatch.choose(x.double()) == "reference"
    assert "found torch.float64" in dispatch.why_not(x.double(), "cpu")


def test_cpu_kernels_are_the_default_where_they_are_built(x, monkeypatch):
    monkeypatch.delenv("CIN_FAST_BACKEND", raising=False)
    expected = "reference" if dispatch.unavailable("cpu") else "cpu"
    assert dispatch.choose(x) == expected


@pytest.mark.parametrize(
    ("dtype", "positions", "first"),
    [
        (torch.bfloat16, 196, "cuda"),
        (torch.float16, 208, "cuda"),
        (torch.float16, 209, "matmul"),
        (torch.float32, 196, "matmul"),
        (torch.float64, 196, "reference"),
    ],
)
def test_on_a_gpu_dtype_and_positions_decide(dtype, positions, first):
    assert dispatch.preferred("cuda", dtype, positions)[0] == first


def test_fused_positions_are_those_of_the_kernels(repository):
    host = (repository / "csrc" / "cuda" / "host.cuh").read_text()
    assert f"kWide = {dispatch._FUSED_POSITIONS};" in host


def test_what_is_measured_decides(repository):
    """In every committed comparison of a GPU's backends the chosen one, where it took part, needs
    at most 1.15 times as long as the fastest, both directions together."""
    files = sorted((repository / "bench" / "results").glob("*/backends.json"))
    assert files
    for path in files:
        for row in json.loads(path.read_text())["rows"]:
            case, seconds = row["case"], row["both"]
            dtype = getattr(torch, case["dtype_name"])
            chosen = dispatch.preferred("cuda", dtype, case["height"] * case["width"])[0]
            fastest = min(seconds[name] for name in dispatch.BACKENDS if name in seconds)
            assert seconds.get(chosen, 0.0) <= 1.15 * fastest, (path.parent.name, row)


def test_the_environment_overrides(x, monkeypatch):
    monkeypatch.setenv("CIN_FAST_BACKEND", "reference")
    assert dispatch.choose(x) == "reference"
    monkeypatch.setenv("CIN_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CIN_FAST_BACKEND: 'cuda' cannot run here: it runs on"):
        dispatch.choose(x)


def test_a_backend_named_explicitly_raises_with_the_reason(x):
    with pytest.raises(
        ValueError, match="backend: 'cuda' cannot run here: it runs on cuda tensors"
    ):
        cin_fast.sci(x, backend="cuda")
    with pytest.raises(ValueError, match=r"backend: expected one of .*, found 'tpu'"):
        cin_fast.sci(x, backend="tpu")


def test_an_extension_for_another_torch_is_refused(monkeypatch):
    if dispatch._library("_cpu") is None:
        pytest.skip("the C++ extension is not built")
    monkeypatch.setattr(dispatch, "_build_record", lambda: {"torch": "1.0.0"})
    with pytest.warns(UserWarning, match="the cpu backend is off: .* built for torch 1.0.0"):
        reason = dispatch._load_extension("cpu")
    assert "built for torch 1.0.0" in reason


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_build_record", dict)
    monkeypatch.setattr(dispatch, "_library", lambda name: None)
    assert "python setup.py build_ext --inplace" in dispatch._load_extension("cpu")


def test_why_it_was_not_built_is_repeated(monkeypatch):
    record = {"torch": torch.__version__, "reasons": {"cpu": "no C++ compiler"}}
    monkeypatch.setattr(dispatch, "_build_record", lambda: record)
    monkeypatch.setattr(dispatch, "_library", lambda name: None)
    assert dispatch._load_extension("cpu") == "cin_fast._cpu was not built: no C++ compiler"


def test_the_commit_is_not_another_repositorys(monkeypatch, tmp_path):
    """Installed into an environment inside a repository, the package has no commit of its own."""
    package = tmp_path / "environment" / "cin_fast"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    commit = ["git", *author, "-C", str(tmp_path), "commit", "-qm", "x", "--allow-empty"]
    subprocess.run(commit, check=True)
    monkeypatch.setattr(info, "__file__", str(package / "info.py"))
    assert info.git_commit() == "unknown"


def test_info_on_a_full_disk_is_a_line(monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(info, "report", lambda: "report")
    assert info.main() == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert info.main() == 2
    assert capsys.readouterr().err == "python -m cin_fast.info: error: No space left on device\n"


def test_info_names_every_backend():
    text = report()
    for backend in dispatch.BACKENDS:
        assert any(line.startswith(backend) for line in text.splitlines())
    if not torch.cuda.is_available():
        assert "off: no CUDA device is visible" in text


def test_an_extension_of_an_older_checkout_is_refused(cpu_extension, monkeypatch):
    older = dispatch._build_record() | {"schemas": {"cpu_sci": "(Tensor x) -> Tensor"}}
    monkeypatch.setattr(dispatch, "_build_record", lambda: older)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    with pytest.warns(UserWarning, match="the cpu backend is off"):
        reason = dispatch._load_extension("cpu")
    assert "_cpu was built for another schema of sci: build again" in reason
    # Loading it could have ended the process.
    assert not loaded


def test_an_extension_without_a_kernel_is_refused(cpu_extension, monkeypatch):
    monkeypatch.setitem(schemas.COMPILED["cpu"], "later", "() -> ()")
    record = dispatch._build_record()
    record["schemas"]["cpu_later"] = "() -> ()"
    monkeypatch.setattr(dispatch, "_build_record", lambda: record)
    with pytest.warns(UserWarning, match="_cpu holds no later: build again"):
        dispatch._load_extension("cpu")


def test_an_exported_program_runs_where_backends_are_loaded(cpu_extension, tmp_path):
    class Interaction(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cci = CCI(5)

        def forward(self, x):
            # Operators of three modules, of which the package imports one.
            return self.cci.pooled_pair(x, torch.arange(2) ^ 1).z_pair_BC + cin_fast.sci(x).mean()

    module, x = Interaction(), torch.randn(2, 5, 6, 4)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
    torch.save(x, tmp_path / "x.pt")
    lines = (
        "import torch, cin_fast",
        "assert not cin_fast.load_backends()['cpu']",
        "program = torch.export.load('program.pt2').module()",
        "torch.save(program(torch.load('x.pt')), 'y.pt')",
    )
    path = str(Path(cin_fast.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), module(x))
