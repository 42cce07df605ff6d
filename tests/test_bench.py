"""The benchmark suite: it checks before it times, interleaves, and reports what it measured."""

import gc
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


def test_every_round_holds_each_rival_once_in_changing_order(bench):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = bench("measure").interleaved(calls, torch.device("cpu"), budget=0.0, least=8, most=8)
    assert set(found) == {"a", "b", "c"}
    assert all(len(measured.seconds) == 8 for measured in found.values())
    # One call each for the memory, then eight rounds.
    assert len(order) == 3 * (1 + 8)
    rounds = ["".join(order[i : i + 3]) for i in range(3, 27, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 2


def test_a_slow_rival_takes_part_in_the_first_rounds_alone(bench, monkeypatch):
    measure, order = bench("measure"), []
    calls = {"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}
    duration = {calls["slow"]: 1.0, calls["fast"]: 0.1}
    monkeypatch.setattr(measure, "_cpu_seconds", lambda call: (call(), duration[call])[1])
    found = measure.interleaved(calls, torch.device("cpu"), budget=2.05, least=3)
    # Half of the budget each: the fast one has ten rounds, of which the first three are shared.
    assert {name: len(one.seconds) for name, one in found.items()} == {"slow": 3, "fast": 10}
    assert set(order[2:4]) == set(order[4:6]) == set(order[6:8]) == {"slow", "fast"}
    assert order[8:] == ["fast"] * 7


def test_nothing_is_collected_while_rounds_are_timed(bench):
    seen = []
    calls = {"a": lambda: seen.append(gc.isenabled())}
    bench("measure").interleaved(calls, torch.device("cpu"), budget=0.0, least=3, most=3)
    assert seen == [True, False, False, False]


def test_the_cache_is_emptied_in_inference_mode_and_out_of_it(bench, monkeypatch):
    measure = bench("measure")
    monkeypatch.setattr(measure, "_MIB", 16)
    with torch.inference_mode():
        measure._flush_l2("cpu")
    measure._flush_l2("cpu")


def test_what_fails_while_it_is_timed_fails_each_member(bench, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no timer")

    compare = bench("compare")
    monkeypatch.setattr(compare, "interleaved", refuse)
    comparison = compare.Comparison({"a": compare.Selected(("eager", "cpu"))}, seconds=60.0)
    monkeypatch.setattr(comparison, "_look_at_ceilings", lambda name: None)
    group = comparison.group("a", lambda m: compare.Entry(lambda: None, lambda: None))
    assert {name: str(error) for name, error in group.failures.items()} == {
        "eager": "no timer",
        "cpu": "no timer",
    }


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
        "device": "A box", "folder": "a-box", "processors": 2, "threads": 2, "load_before": 0.1,
        "command": "pytest bench", "backends": {},
        "versions": {"torch": "1", "triton": "2", "cuda (torch)": "none"},
    }  # fmt: skip
    benchmarks = [
        {
            "group": group,
            "params": {"rival": rival},
            "stats": {"data": seconds},
            "extra_info": {
                "peak_bytes": 2**20, "flops": 1e6, "bytes": 1e6, "dtype": "float32",
            },
        }
        for group, rival, seconds in rows
    ]  # fmt: skip
    return {
        "machine_info": machine, "benchmarks": benchmarks, "commit": "abc",
        "datetime": "2026-01-02",
        "ceilings": {"float32": {"flops": 2e9, "bytes": 4e9}},
        "left_out": [{"group": rows[0][0], "rival": "flex", "reason": "needs a CUDA device"}],
    }  # fmt: skip


SCI = "sci: resnet50-448 B1 C2 L3 float32 forward"
ROWS = (
    (SCI, "eager", [4e-3, 8e-3]), (SCI, "sdpa", [3e-3, 6e-3]), (SCI, "cpu", [1e-3, 2e-3]),
    (SCI, "reference", [5e-4, 5e-4]),
)  # fmt: skip


def test_the_short_table_gives_ratios_of_rounds_to_each_rival(bench):
    run = bench("results_file").from_benchmark(make_run(*ROWS))
    (row,) = bench("report").short_table(run).splitlines()[2:]
    assert row == "| dense `sci`, forward | cpu | 4.00 | - | 3.00 | 1 / 1 |"


def test_the_full_table_gives_times_shares_and_reasons(bench, tmp_path):
    report, results = bench("report"), bench("results_file")
    run = results.from_benchmark(make_run(*ROWS))
    report.write(run, tmp_path)
    full = (tmp_path / "README.md").read_text()
    # Medians 6 and 4.5 ms; a million operations in 6 ms of 2e9 a second.
    assert "| eager | 6.000 | 17% of 2 | 0.75 (0.75 to 0.75) | 1 |" in full
    assert "| 0.2 (8%) | 0.17 (4%) |" in full
    assert "- flex: needs a CUDA device" in full
    assert "A box, 2 processors; torch 1, triton 2, CUDA none; cin_fast abc, 2026-01-02" in full
    assert results.load(tmp_path / "results.json") == run


def test_the_ratio_is_not_moved_by_a_machine_that_slows_down(bench):
    results = bench("results_file")
    ours, rival = (
        results.from_benchmark(make_run((SCI, "x", seconds))).results[0]
        for seconds in ([1e-3, 1e-3, 9e-3], [2e-3, 2e-3, 18e-3])
    )
    assert results.ratios(ours, rival) == (2, 2, 2)


def test_models_refer_to_the_plain_backbone(bench):
    group = "models: inference B1 448 px"
    run = bench("results_file").from_benchmark(
        make_run((group, "vgg19", [1e-3]), (group, "resnet50", [2e-3]),
                 (group, "resnet50-cin", [3e-3]), (group, "resnet50-cin-naive", [4.5e-3]))
    )  # fmt: skip
    assert "vgg19 0.500, resnet50-cin 1.500" in bench("report").overheads(run)
    assert "| inference, ResNet-50 + CIN |  | 1.50 | - | - |" in bench("report").short_table(run)


@pytest.mark.parametrize("run", [None, "{}", '{"benchmarks": []}'])
def test_what_is_no_run_is_refused_in_one_line(bench, tmp_path, capsys, run):
    path = tmp_path / "run.json"
    if run is not None:
        path.write_text(run)
    assert bench("report").main([str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_readme_says_what_the_committed_results_say(bench, repository):
    report = bench("report")
    text = (repository / "README.md").read_text()
    section = report.readme_section(repository / "bench" / "results")
    assert report.replace_section(text, section) == text


def test_the_kernels_document_says_what_the_committed_gpu_results_say(bench, repository):
    report = bench("report")
    text = (repository / "docs" / "kernels.md").read_text()
    section = report.kernels_section(repository / "bench" / "results")
    assert report.replace_section(text, section) == text


def make_gpu_run():
    """Of ``make gpu``: a forward pass, one with gradients, and a pair that only ours could do."""

    def part(group, flops, ceiling, left_out=(), **seconds):
        rivals = {name.replace("_", "-"): {"seconds": s} for name, s in seconds.items()}
        return {
            "groups": {group: {"flops": flops, "dtype": "bfloat16", "rivals": rivals}},
            "ceilings": {"bfloat16": {"flops": ceiling, "bytes": 3e12}},
            "left_out": [{"group": group, "rival": r, "reason": why} for r, why in left_out],
        }

    shape = "resnet50-448 B20 C2048 L196 bfloat16"
    why = (("sdpa-cudnn", "no kernel"), ("cpu", "needs a CPU tensor"))
    parts = {
        "bench sci": part(f"sci: {shape} forward", 1e11, 5e14, why,
                          eager=2e-3, sdpa_flash=1e-3, reference=1e-4, triton=8e-4, cuda=5e-4),
        "bench head": part(f"head: {shape} forward + backward", 1e11, 8e14,
                           eager=4e-3, triton=1e-3),
        "bench cci": part(f"cci: {shape} forward", 1e11, 6e14, cuda=1e-3),
    }  # fmt: skip
    steps = [
        {"name": name, "status": "passed", "summary": "2 passed", "measured": one}
        for name, one in parts.items()
    ]
    steps.append({"name": "racecheck", "status": "timed out", "summary": "slow", "measured": {}})
    return {
        "device": "A GPU", "driver": "5", "commit": "abc", "date": "2026-01-02", "steps": steps,
        "versions": {"torch": "1", "triton": "2", "cuda (torch)": "3"},
    }  # fmt: skip


@pytest.fixture
def gpu_results(tmp_path):
    path = tmp_path / "results" / "a-gpu" / "gpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(make_gpu_run()))
    return path


def test_the_gpu_table_has_a_row_an_operator_and_direction(bench, gpu_results):
    gpu_report = bench("gpu_report")
    rows = gpu_report.table(gpu_report.load(gpu_results)).splitlines()[2:]
    # The best ceiling of the three counts: 1e11 operations in 0.5 ms of 8e14 a second.
    assert rows == [
        "| dense `sci`, bfloat16, forward | 1.0000 (sdpa-flash) | 0.8000 | 0.5000 | 2.00 | 25% |",
        "| head, pooled, bfloat16, forward + backward | 4.0000 (eager) | 1.0000 | - | 4.00 | 12% |",
        "| dense `cci`, bfloat16, forward | - | - | 1.0000 | - | 12% |",
    ]


def test_the_gpu_report_says_where_who_had_no_turn_and_how_steps_ended(bench, gpu_results):
    section = bench("report").kernels_section(gpu_results.parent.parent)
    assert "A GPU, driver 5; torch 1, triton 2, CUDA 3; cin_fast abc, 2026-01-02;" in section
    assert "bfloat16 product 800 TFLOP/s, copy 3000 GB/s" in section
    left_out = "- Left out: sdpa-cudnn (sci: resnet50-448 B20 C2048 L196 bfloat16 forward): no"
    assert left_out in section
    assert "cpu" not in section
    assert "- Not run, as each shape takes up to a minute: compiled, flex" in section
    assert "- racecheck: timed out (slow)" in section


def test_the_gpu_report_writes_both_documents(bench, gpu_results, monkeypatch, capsys):
    report, folder = bench("report"), gpu_results.parent.parent
    for name in ("README", "KERNELS"):
        path = folder / f"{name}.md"
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        monkeypatch.setattr(report, name, path)
    monkeypatch.setattr(report, "RESULTS", folder)
    assert report.main(["--gpu", str(gpu_results)]) == 0
    assert "1.0000 (sdpa-flash) | 0.8000 | 0.5000" in capsys.readouterr().out
    readme, kernels = ((folder / f"{name}.md").read_text() for name in ("README", "KERNELS"))
    row = "| dense `sci`, bfloat16, forward | 1.0000 (sdpa-flash) | 0.5000 (cuda) | 2.00 |"
    assert row in readme
    assert "A GPU, driver 5; torch 1" in readme
    assert report.NO_GPU not in readme + kernels
    assert "| 0.8000 | 0.5000 | 2.00 | 25% |" in kernels
    assert kernels.startswith("before\n")
    assert kernels.endswith("\nafter\n")


def make_kernel_run():
    """Of ``bench/kernel_times.py``: ``sci`` by a rival and by ours, thin ``sci`` by ours alone."""

    def row(columns, name, commit, forward, both, *kernels):
        return {
            "operator": "sci", "columns": columns, "name": name, "commit": commit,
            "forward": {"seconds": forward, "flops": 4e10},
            "both": {"seconds": both, "flops": 1.2e11},
            "kernels": [{"name": n, "calls": c, "seconds": s} for n, c, s in kernels],
        }  # fmt: skip

    case = {"name": "resnet50-448", "batch": 20, "channels": 2048, "height": 14, "width": 14,
            "dtype_name": "bfloat16", "backward": False}  # fmt: skip
    return make_gpu_run() | {
        "case": case,
        "ceilings": {"bfloat16": {"flops": 8e14, "bytes": 3e12}},
        "left_out": [
            {"operator": "sci", "columns": 196, "name": "sdpa-flash", "reason": "no kernel"}
        ],
        "rows": [
            row(196, "sdpa-cudnn", "b" * 40, 2e-4, 9e-4, ("fprop", 1, 7e-5)),
            row(196, "eager", "b" * 40, 4e-4, 3e-3, ("softmax", 1, 1e-4)),
            row(196, "cuda", "a" * 40, 1e-4, 6e-4, ("rows", 3, 5e-5), ("fill", 2, 3e-6)),
            row(9, "cuda", "a" * 40, 5e-5, 3e-4, ("thin_rows", 1, 2.5e-5)),
        ],
    }


@pytest.fixture
def kernel_results(gpu_results):
    gpu_results.with_name("kernels.json").write_text(json.dumps(make_kernel_run()))
    return gpu_results


def test_kernel_times_stand_beside_the_fastest_rival(bench, kernel_results):
    report = bench("report")
    readme, kernels = (
        section(kernel_results.parent.parent).splitlines()
        for section in (report.readme_section, report.kernels_section)
    )
    title = "| dense `sci`, bfloat16, forward + backward | 0.9000 (sdpa-cudnn)"
    assert f"{title} | 0.6000 (cuda) | 1.50 |" in readme
    assert "| thin `sci`, bfloat16, forward | - | 0.0500 (cuda) | - |" in readme
    # 1.2e11 operations in 0.6 ms of 8e14 a second.
    assert f"{title} | - | 0.6000 | 1.50 | 25% |" in kernels
    assert kernels[kernels.index("|  | kernel | launches | us |") + 2 : -1] == [
        "| dense `sci`, sdpa-cudnn | `fprop` | 1 | 70.0 |",
        "| dense `sci`, cuda | `rows` | 3 | 50.0 |",
        "| thin `sci`, cuda | `thin_rows` | 1 | 25.0 |",
    ]  # fmt: skip
    for lines, commits in (
        (readme, f"Commits: sdpa-cudnn at {'b' * 12}; cuda at {'a' * 12}. No rival was measured"),
        (kernels, f"Commits: sdpa-cudnn, eager at {'b' * 12}; cuda at {'a' * 12}."),
    ):
        text = "\n".join(lines)
        assert commits in text
        assert "No rival was measured for thin `sci`." in text
        assert "bfloat16 product 800 TFLOP/s, copy 3000 GB/s" in text
    reason = "resnet50-448 B20 C2048 L196 bfloat16 forward + backward): no kernel"
    assert f"- Left out: sdpa-flash (sci: {reason}" in kernels


def test_a_gpu_run_without_medians_shows_its_steps_alone(bench, gpu_results):
    run = make_gpu_run()
    for one in run["steps"]:
        one.update(measured={}, status="failed")
    gpu_results.write_text(json.dumps(run | {"commit": "0123456789abcdef-dirty"}))
    report = bench("report")
    kernels = report.kernels_section(gpu_results.parent.parent)
    assert kernels.splitlines()[1].endswith("; cin_fast 0123456789ab-dirty, 2026-01-02.")
    assert "- bench sci: failed (2 passed)" in kernels
    assert "|" not in kernels
    assert "Medians" not in kernels
    readme = report.readme_section(gpu_results.parent.parent)
    assert "not passed: bench sci, bench head, bench cci, racecheck." in readme
    assert "Medians" not in readme
    assert "|" not in readme


def test_kernels_are_named_without_what_surrounds_them(bench):
    short = bench("kernel_times").short_name
    names = {
        "void cin_fast::sci::(anonymous namespace)::rows_kernel<__nv_bfloat16, (int)208, (bool)0>"
        "(cin_fast::Maps, Parameters<T1>)": "rows_kernel",
        "sci_backward": "sci_backward",
        "Memset (Device)": "Memset (Device)",
        "void at::native::vectorized_elementwise_kernel<8, at::native::FillFunctor<float>, "
        "std::array<char*, 1ul> >(int, at::native::FillFunctor<float>)": "FillFunctor",
    }
    assert {name: short(name) for name in names} == names


@pytest.mark.parametrize("run", ["{}", "[]", "{", '{"case": {"name": 1}, "rows": []}'])
def test_what_is_no_run_of_kernel_times_is_refused(bench, tmp_path, run):
    path = tmp_path / "kernels.json"
    path.write_text(run)
    with pytest.raises(ValueError, match=r"kernel_times|Expecting"):
        bench("kernel_report").load(path)


def test_products_are_counted_as_written(bench):
    case = bench("cases").Case("one", 3, 64, 5, 4)
    flops = bench("kernel_times").flops
    assert flops(case, 20) == {"forward": 3 * 4 * 64**2 * 20, "both": 3 * 14 * 64**2 * 20}
    thin = 3 * 2 * 64**2
    assert flops(case, 9) == {"forward": thin * (20 + 9), "both": thin * (4 * 20 + 3 * 9)}


@pytest.mark.parametrize("run", [None, "{}", "[]", "{"])
def test_what_is_no_gpu_run_is_refused_in_one_line(bench, tmp_path, capsys, run):
    path = tmp_path / "gpu.json"
    if run is not None:
        path.write_text(run)
    assert bench("report").main(["--gpu", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_case_is_judged_in_the_shape_that_is_timed(bench):
    operators, rivals = bench("operators"), bench("rivals")
    x = torch.relu(torch.randn(6, 12, 5))
    problem = operators.Problem(rivals.eager_sci, (x,), dy=torch.randn_like(x))
    shapes = []

    def right(x):
        shapes.append(x.shape)
        return rivals.eager_sci(x)

    operators.check_rule("right", right, problem)
    assert shapes == [x.shape]
    for image in (0, 5):

        def wrong(x, image=image):
            y = rivals.eager_sci(x)
            return y * (torch.arange(6) == image).mul(1e-3).add(1)[:, None, None]

        with pytest.raises(AssertionError, match="against float64, allowed"):
            operators.check_rule("wrong", wrong, problem)


def test_a_wrong_gradient_is_found(bench):
    operators, rivals = bench("operators"), bench("rivals")
    x = torch.relu(torch.randn(6, 12, 5))
    problem = operators.Problem(rivals.eager_sci, (x,), dy=torch.randn_like(x))

    def wrong(x):
        y = rivals.eager_sci(x)
        return y.detach() + 1.001 * (y - y.detach())

    with pytest.raises(AssertionError, match="gradient 0"):
        operators.check_rule("wrong", wrong, problem)


def test_after_the_limit_nothing_is_started(bench):
    compare = bench("compare")
    comparison = compare.Comparison({"sci: a": compare.Selected(("eager",))}, seconds=-1.0)
    group = comparison.group("sci: a", lambda name: pytest.fail("it was started"))
    assert "CIN_FAST_BENCH_SECONDS" in group.reasons["eager"]


def test_what_a_group_does_not_use_the_later_ones_get(bench, monkeypatch):
    compare, now = bench("compare"), [100.0]
    monkeypatch.setattr(compare.time, "monotonic", lambda: now[0])
    plan = compare.Plan(60.0, {"a": 1.0, "b": 1.0, "c": 4.0})
    assert plan.allow("a") == pytest.approx(10)
    now[0] += 35
    assert plan.allow("b") == pytest.approx(5)
    assert plan.allow("c") == pytest.approx(25)
    now[0] += 30
    assert compare.Plan(-1.0, {"a": 1.0}).allow("a") == 0


def test_a_time_is_predicted_from_the_call_nearest_in_size(bench):
    pace = bench("compare").Pace()
    assert pace.predict("sci", "eager", 1e9) == 0
    pace.learn("sci", "eager", 1e6, 1e-3)
    pace.learn("sci", "eager", 1e9, 0.2)
    assert pace.predict("sci", "eager", 4e9) == pytest.approx(0.8)
    assert pace.predict("sci", "eager", 2e6) == pytest.approx(2e-3)
    assert pace.predict("sci", "cpu", 4e9) == 0


def test_what_would_take_too_long_is_left_out_and_says_how_long(bench, monkeypatch):
    compare, prepared = bench("compare"), []
    selected = {"sci: a": compare.Selected(("reference", "eager", "cpu"))}
    comparison = compare.Comparison(selected, seconds=10.0, least=3)
    monkeypatch.setattr(comparison, "_look_at_ceilings", lambda name: None)
    for member, seconds in (("cpu", 0.1), ("eager", 1.0), ("reference", 2.0)):
        comparison.pace.learn("sci", member, 1e9, seconds)

    def prepare(member):
        prepared.append(member)
        return compare.Entry(lambda: None, lambda: None)

    group = comparison.group("sci: a", prepare, 1e9)
    # Ours and the rival take 5 calls each, 5.5 of 10 s; the reference would take 10 more.
    assert prepared == ["cpu", "eager"] == list(group.measured)
    assert group.reasons["reference"].startswith("would take 10 s, and its group had 10 s for all")


def test_one_that_fails_costs_no_other_its_time(bench, monkeypatch):
    compare = bench("compare")
    comparison = compare.Comparison({"sci: a": compare.Selected(("cpu", "eager"))}, seconds=60.0)
    monkeypatch.setattr(comparison, "_look_at_ceilings", lambda name: None)

    def check(member):
        assert member != "cpu", "wrong"

    group = comparison.group("sci: a", lambda m: compare.Entry(lambda: None, lambda: check(m)))
    assert list(group.measured) == ["eager"]
    assert "wrong" in str(group.failures["cpu"])


def test_the_readme_section_is_replaced(bench):
    report = bench("report")
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    section = f"{report.BEGIN}\nnew\n{report.END}"
    assert report.replace_section(text, section) == f"before\n{section}\nafter\n"
    with pytest.raises(ValueError, match=r"README\.md holds no"):
        report.replace_section("nothing", section)


def run_bench(repository, *arguments):
    # A process among several that share these tests starts one that shares with nobody.
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only", *arguments],
        cwd=repository,
        env=own | {"CIN_FAST_BENCH_QUICK": "1", "OMP_NUM_THREADS": "1"},
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
    assert all(one["stats"]["rounds"] >= 3 for one in run["benchmarks"])
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
    # A rival that fails is left out with its reason; a backend of ours that fails is a failure.
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert "reference y: error" in result.stdout
    run = json.loads(path.read_text())
    assert [one["params"]["rival"] for one in run["benchmarks"]] == ["eager"]


@pytest.mark.slow
def test_targets_read_the_rounds_of_their_subject(repository, tmp_path):
    path = tmp_path / "run.json"
    chosen = "test_sci and resnet18-224-float32-forward or dense-sci-forward-float32"
    result = run_bench(repository, "-k", chosen, f"--benchmark-json={path}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert torch.cuda.is_available() or "ms an image" in result.stdout
    found = {"sci": {}, "cpu_targets": {}}
    for one in json.loads(path.read_text())["benchmarks"]:
        found[one["group"].partition(":")[0]][one["params"]["rival"]] = one["stats"]["data"]
    assert set(found["sci"]) >= {"eager", "sdpa", "reference"}
    assert set(found["cpu_targets"]) <= {"cpu", "sdpa"}
    for rival, seconds in found["cpu_targets"].items():
        assert seconds == pytest.approx(found["sci"][rival])


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_was_measured(repository, tmp_path):
    path, plugin = tmp_path / "run.json", tmp_path / "interrupt.py"
    plugin.write_text(
        "def pytest_runtest_setup(item):\n"
        "    if 'backward' in item.name or 'both' in item.name:\n"
        "        raise KeyboardInterrupt\n"
    )
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        result = run_bench(
            repository, "-p", "interrupt", "-k", "test_sci and resnet18-224-float32",
            f"--benchmark-json={path}",
        )  # fmt: skip
    finally:
        del os.environ["PYTHONPATH"]
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    assert "eager" in {one["params"]["rival"] for one in json.loads(path.read_text())["benchmarks"]}


@pytest.mark.slow
def test_it_refuses_to_time_beside_itself(repository):
    result = run_bench(repository, "-n", "2")
    assert result.returncode == 4
    assert "run pytest bench without -n" in result.stderr
