"""The benchmark suite: it checks before it times, interleaves, and reports what it measured."""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch

import cin_fast


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


def test_peak_memory_holds_what_a_call_keeps_for_the_next(bench, cpu_extension):
    x = torch.relu(torch.randn(1, 512, 4096))
    cin_fast.sci(x, backend="cpu")
    peak = bench("measure").peak_bytes(lambda: cin_fast.sci(x, backend="cpu"), x.device)
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident size")
    # The result; packed x, packed v and the sums.
    assert peak > 4 * x.nbytes


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


def test_the_readme_gives_ratios_of_rounds_to_each_rival(bench):
    run = bench("results_file").from_benchmark(make_run(*ROWS))
    (row,) = bench("report").cpu_rows(run)
    # Each side's time doubles from one round to the next: spreads of 17 %.
    assert row == ("dense `sci`, forward", "CPU", "cpu", "~4.00", "-", "~3.00", "1 / 1")


def test_a_ratio_of_times_that_spread_is_marked_and_the_mark_explained(bench, tmp_path):
    report, results = bench("report"), bench("results_file")
    rows = ((SCI, "eager", [4e-3, 4.5e-3, 5e-3, 5.5e-3, 6e-3]),
            (SCI, "sdpa", [3e-3, 3e-3, 3e-3, 3.24e-3, 4e-3]),
            (SCI, "cpu", [0.9e-3, 0.9e-3, 1e-3, 1.1e-3, 1.1e-3]))  # fmt: skip
    run = results.from_benchmark(make_run(*rows))
    assert [round(one.spread, 2) for one in run.results] == [0.1, 0.04, 0.1]
    (row,) = report.cpu_rows(run)
    assert row[3:6] == ("~5.00", "-", "3.33")
    report.write(run, tmp_path / "a-box")
    assert results.WHAT_IS_MARKED in report.readme_section(tmp_path)
    report.write(results.from_benchmark(make_run(*rows[1:])), tmp_path / "a-box")
    assert "~" not in report.readme_section(tmp_path)


def test_the_readme_leaves_out_what_was_compared_with_nobody(bench):
    alone = SCI.replace("forward", "forward + backward")
    run = bench("results_file").from_benchmark(
        make_run(*ROWS, (alone, "cpu", [1e-3]), (alone, "reference", [1e-3]))
    )
    (row,) = bench("report").cpu_rows(run)
    assert row[0] == "dense `sci`, forward"


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
    section = report.readme_section(tmp_path.parent)
    assert "| dense `sci`, forward | CPU | cpu | ~4.00 | - | ~3.00 | 1 / 1 |" in section
    assert report.NO_GPU in section


def test_the_full_table_begins_with_the_targets(bench, tmp_path):
    report = bench("report")
    row = {"name": "dense", "rival": "sdpa", "ratio": 1.5, "must": 2, "aim": 3, "overhead": False,
           "spread": 0.07, "verdict": "missed", "commit": "abc"}  # fmt: skip
    targets = {"machine": "A box", "versions": {"torch": "1"}, "targets": [row]}
    (tmp_path / "cpu_targets.json").write_text(json.dumps(targets))
    report.write(bench("results_file").from_benchmark(make_run(*ROWS)), tmp_path)
    full = (tmp_path / "README.md").read_text()
    line = full.index("| dense | sdpa | 1.50 | 7% | ≥ 2.00 | ≥ 3.00 | missed |")
    assert line < full.index("## sci:")


@pytest.mark.parametrize(
    ("ratio", "spread", "overhead", "verdict"),
    [
        (2.5, 0.1, False, "aim"),
        (2.1, 0.1, False, "must (aim within the spread)"),
        (1.9, 0.1, False, "must (aim within the spread)"),
        (1.5, 0.1, False, "must"),
        (1.05, 0.1, False, "within the spread of must"),
        (0.95, 0.1, False, "within the spread of must"),
        (0.8, 0.1, False, "missed"),
        (0.8, 0.1, True, "aim"),
        (0.95, 0.0, True, "must"),
        (0.92, 0.05, True, "must (aim within the spread)"),
        (1.05, 0.1, True, "within the spread of must"),
        (1.2, 0.1, True, "missed"),
    ],
)
def test_a_bound_within_the_spread_is_neither_reached_nor_missed(
    bench, ratio, spread, overhead, verdict
):
    must, aim = (1.0, 0.9) if overhead else (1.0, 2.0)
    row = bench("bench_cpu_targets").Row(
        "dense", "sdpa", ratio, must, aim, overhead, 1.0, 1.0, None, None, 3, spread
    )
    assert row.verdict == verdict


def test_the_committed_tables_are_of_the_committed_results(bench, repository):
    report, results = bench("report"), bench("results_file")
    committed = list((repository / "bench" / "results").glob("*/results.json"))
    assert committed
    for kept in committed:
        targets = kept.with_name("cpu_targets.json")
        found = json.loads(targets.read_text()) if targets.exists() else None
        full = report.full_table(results.load(kept), found)
        assert kept.with_name("README.md").read_text() == full


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
    full = bench("report").full_table(run)
    assert "vgg19 0.500, resnet50-cin 1.500" in full
    assert "~" not in full
    (row,) = bench("report").cpu_rows(run)
    assert row[:6] == ("inference, ResNet-50 + CIN", "CPU", "", "1.50", "-", "-")


@pytest.mark.parametrize("run", [None, "{}", '{"benchmarks": []}'])
def test_what_is_no_run_is_refused_in_one_line(bench, tmp_path, capsys, run):
    path = tmp_path / "run.json"
    if run is not None:
        path.write_text(run)
    assert bench("report").main([str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_report_of_nothing_is_refused(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench("report").main([])
    assert "error: nothing to do: name a run, --gpu FILE or --readme" in capsys.readouterr().err


def test_the_readme_says_what_the_committed_results_say(bench, repository):
    report = bench("report")
    text = (repository / "README.md").read_text()
    section = report.readme_section(repository / "bench" / "results")
    assert report.replace_section(text, section) == text


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


@pytest.fixture(scope="module")
def selection(repository, tmp_path_factory):
    """What a run printed, and its JSON: two rivals of one case, and a target of that case."""
    path = tmp_path_factory.mktemp("selection") / "run.json"
    chosen = (
        "test_sci and resnet18-224-float32-forward and (eager or sdpa) or dense-sci-forward-float32"
    )
    result = run_bench(repository, "-k", chosen, f"--benchmark-json={path}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout, json.loads(path.read_text())


def seconds_of(run, subject):
    return {
        one["params"]["rival"]: one["stats"]["data"]
        for one in run["benchmarks"]
        if one["group"].startswith(f"{subject}:")
    }


@pytest.mark.slow
def test_a_selection_runs_and_says_why_others_did_not(selection):
    _, run = selection
    assert set(seconds_of(run, "sci")) == {"eager", "sdpa"}
    assert all(one["stats"]["rounds"] >= 3 for one in run["benchmarks"])
    assert run["ceilings"]["float32"]["flops"] > 1e9
    if not torch.cuda.is_available():
        reasons = {one["rival"]: one["reason"] for one in run["left_out"]}
        assert reasons["sdpa-flash"] == "needs a CUDA device"


@pytest.mark.slow
def test_targets_read_the_rounds_of_their_subject(selection):
    printed, run = selection
    assert torch.cuda.is_available() or "ms an image" in printed
    subject, target = seconds_of(run, "sci"), seconds_of(run, "cpu_targets")
    assert set(target) <= {"cpu", "sdpa"}
    assert torch.cuda.is_available() or target["sdpa"] == pytest.approx(subject["sdpa"])


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
            repository, "-p", "interrupt", "-k", "test_sci and resnet18-224-float32 and eager",
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
