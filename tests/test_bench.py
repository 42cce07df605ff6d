"""The benchmark suite: it checks before it times, interleaves, and reports what it measured."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def bench(repository, monkeypatch):
    """Imports a module of bench/ that needs nothing of its conftest."""
    monkeypatch.syspath_prepend(str(repository / "bench"))
    return importlib.import_module


def test_rounds_alternate_between_rivals(bench):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = bench("measure").interleaved(calls, torch.device("cpu"), budget=0.0, least=4, most=4)
    assert set(found) == {"a", "b", "c"}
    assert all(len(measured.seconds) == 4 for measured in found.values())
    # A warm-up and an estimate, four rounds, then one call each for the memory.
    assert order == list("abc") * 6 + list("abc")


def test_peak_memory_is_what_a_call_holds(bench):
    size = 64 << 20

    def call():
        return torch.ones(size // 4).sum()

    peak = bench("measure").peak_bytes(call, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident size")
    assert 0.8 * size < peak < 1.5 * size


def make_run(*rows):
    machine = {
        "device": "A box",
        "versions": {"torch": "1", "triton": "2", "cuda (torch)": "none"},
        "backends": {},
    }
    benchmarks = [
        {
            "group": group,
            "params": {"rival": rival},
            "stats": {"median": seconds, "iqr": 0.0, "rounds": 5},
            "extra_info": {
                "peak_bytes": 2**20, "flops_per_second": 1e9, "flops_share": 0.5,
                "bytes_per_second": 1e9, "bytes_share": 0.25,
            },
        }
        for group, rival, seconds in rows
    ]  # fmt: skip
    return {
        "machine_info": machine, "benchmarks": benchmarks, "commit": "abc", "datetime": "today",
        "ceilings": {"float32": {"flops": 2e9, "bytes": 4e9}},
        "left_out": [{"group": rows[0][0], "rival": "flex", "reason": "needs a CUDA device"}],
    }  # fmt: skip


def test_ratios_refer_to_the_fastest_rival(bench, tmp_path):
    report = bench("report")
    group = "sci: net B1 C2 L3 float32 forward"
    run = make_run((group, "eager", 4e-3), (group, "sdpa", 3e-3), (group, "cpu", 1e-3),
                   (group, "reference", 5e-4))  # fmt: skip
    table = report.short_table(report.read(run))
    assert table.splitlines()[2].split(" | ")[1:4] == ["cpu", "sdpa", "3.00"]
    report.write(run, tmp_path)
    full = (tmp_path / "README.md").read_text()
    assert "| eager | 4.000 | 0% | 0.75 | 1.0 | 1.0 (50%) | 1.00 (25%) |" in full
    assert "- flex: needs a CUDA device" in full
    assert "A box; torch 1, triton 2, CUDA none; cin_fast abc" in full
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 4


def test_models_refer_to_the_plain_backbone(bench):
    report = bench("report")
    group = "models: inference B1 448 px"
    run = make_run((group, "vgg19", 1e-3), (group, "resnet50", 2e-3), (group, "resnet50-cin", 3e-3))
    assert "resnet50-cin | 1.500 x resnet50" in report.models_table(report.read(run))


def test_the_readme_section_is_replaced(bench):
    report = bench("report")
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    section = f"{report.BEGIN}\nnew\n{report.END}"
    assert report.replace_section(text, section) == f"before\n{section}\nafter\n"
    with pytest.raises(ValueError, match=r"README\.md holds no"):
        report.replace_section("nothing", section)


def test_the_readme_has_a_place_for_it(bench, repository):
    report = bench("report")
    assert report.replace_section((repository / "README.md").read_text(), "")


def run_bench(repository, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only", *arguments],
        cwd=repository,
        env=os.environ | {"CIN_FAST_BENCH_QUICK": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_a_selection_runs_and_says_why_others_did_not(repository, tmp_path):
    path = tmp_path / "run.json"
    chosen = "test_sci and resnet18-224-float32-forward and (eager or sdpa)"
    result = run_bench(repository, "-k", chosen, f"--benchmark-json={path}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    run = json.loads(path.read_text())
    assert {one["params"]["rival"] for one in run["benchmarks"]} == {"eager", "sdpa"}
    assert all(one["stats"]["rounds"] >= 5 for one in run["benchmarks"])
    assert run["ceilings"]["float32"]["flops"] > 1e9
    if not torch.cuda.is_available():
        reasons = {one["rival"]: one["reason"] for one in run["left_out"]}
        assert reasons["sdpa-flash"] == "needs a CUDA device"


@pytest.mark.slow
def test_what_is_wrong_is_not_timed(repository, tmp_path):
    path, plugin = tmp_path / "run.json", tmp_path / "spoil.py"
    plugin.write_text(
        "import cin_fast.reference as r\n"
        "right = r.sci\n"
        "r.sci = lambda x, v, scale: right(x, v, scale) * (1 if x.dtype.itemsize == 8 else 1.001)\n"
    )
    chosen = "test_sci and resnet18-224-float32-forward and (eager or reference)"
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        result = run_bench(
            repository, "-p", "spoil", "-k", chosen, f"--benchmark-json={path}", "-rs"
        )
    finally:
        del os.environ["PYTHONPATH"]
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    run = json.loads(path.read_text())
    assert [one["params"]["rival"] for one in run["benchmarks"]] == ["eager"]
    (left_out,) = (one for one in run["left_out"] if one["rival"] == "reference")
    assert "against float64, allowed" in left_out["reason"]
