"""What documents say of a run on a GPU: ``make gpu``'s steps and bench/kernel_times.py's rows."""

import json

import pytest


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


def test_the_readme_marks_a_ratio_of_times_that_spread(bench, gpu_results):
    made = make_gpu_run()
    rivals = next(iter(made["steps"][0]["measured"]["groups"].values()))["rivals"]
    rivals["cuda"]["spread"], rivals["eager"]["spread"] = 0.1, 0.06
    gpu_results.write_text(json.dumps(made))
    section = bench("report").readme_section(gpu_results.parent.parent)
    assert "| dense `sci`, bfloat16, forward | GPU | cuda | ~4.00 | - | 2.00 | - |" in section


def test_the_gpu_report_says_where_who_had_no_turn_and_how_steps_ended(bench, gpu_results):
    section = bench("report").kernels_section(gpu_results.parent.parent)
    assert "A GPU, driver 5; torch 1, triton 2, CUDA 3; cin_fast abc, 2026-01-02;" in section
    assert "bfloat16 product 800 TFLOP/s, copy 3000 GB/s" in section
    left_out = "- Left out: sdpa-cudnn (sci: resnet50-448 B20 C2048 L196 bfloat16 forward): no"
    assert left_out in section
    assert "cpu" not in section
    assert "- Not run, as each shape takes up to a minute: compiled, flex" in section
    assert "- racecheck: timed out (slow)" in section


def test_a_step_of_another_commit_is_named(bench, gpu_results):
    gpu_report = bench("gpu_report")
    made = make_gpu_run()
    made["steps"][0]["commit"] = "0123456789abcdef"
    gpu_results.write_text(json.dumps(made))
    run = gpu_report.load(gpu_results)
    steps = gpu_report.kernels_paragraphs(run, "folder")[-1].splitlines()
    assert steps[0] == "- bench sci: passed (2 passed), at 0123456789ab"
    assert steps[1] == "- bench head: passed (2 passed)"


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
    row = "| dense `sci`, bfloat16, forward | GPU | cuda | 4.00 | - | 2.00 | - |"
    assert row in readme
    assert "GPU: A GPU, driver 5; torch 1" in readme
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
    text = bench("report").kernels_section(kernel_results.parent.parent)
    kernels = text.splitlines()
    title = "| dense `sci`, bfloat16, forward + backward | 0.9000 (sdpa-cudnn)"
    # 1.2e11 operations in 0.6 ms of 8e14 a second.
    assert f"{title} | - | 0.6000 | 1.50 | 25% |" in kernels
    assert kernels[kernels.index("|  | kernel | launches | us |") + 2 : -1] == [
        "| dense `sci`, sdpa-cudnn | `fprop` | 1 | 70.0 |",
        "| dense `sci`, cuda | `rows` | 3 | 50.0 |",
        "| thin `sci`, cuda | `thin_rows` | 1 | 25.0 |",
    ]  # fmt: skip
    assert f"Commits: sdpa-cudnn, eager at {'b' * 12}; cuda at {'a' * 12}." in text
    assert "No rival was measured for thin `sci`." in text
    assert "bfloat16 product 800 TFLOP/s, copy 3000 GB/s" in text
    reason = "resnet50-448 B20 C2048 L196 bfloat16 forward + backward): no kernel"
    assert f"- Left out: sdpa-flash (sci: {reason}" in kernels


def test_the_readme_has_whole_calls_that_had_a_rival(bench, kernel_results):
    readme = bench("report").readme_section(kernel_results.parent.parent)
    title = "dense `sci`, bfloat16, forward"
    # Of the benchmark; of the whole calls, which the benchmark lacks.
    assert f"| {title} | GPU | cuda | 4.00 | - | 2.00 | - |" in readme
    assert f"| {title} + backward | GPU | cuda | 5.00 | - | 1.50 | - |" in readme
    assert "thin `sci`" not in readme
    assert f"cin_fast abc, {'b' * 12}, {'a' * 12}, 2026-01-02" in readme


def make_backend_run():
    """Of ``bench/backends.py``: one question where ours was compared with eager, one where not."""

    def row(dtype_name, precision, both, **more):
        case = {"name": "resnet50-448", "batch": 20, "channels": 2048, "height": 14, "width": 14,
                "dtype_name": dtype_name, "backward": False}  # fmt: skip
        forward = {name: seconds / 4 for name, seconds in both.items()}
        return {"case": case, "operator": "sci", "columns": 0, "precision": precision,
                "forward": forward, "both": both, **more}  # fmt: skip

    peaks = {"cuda": 65 << 20, "eager": 687 << 20}
    return make_gpu_run() | {
        "commit": "c" * 40,
        "rows": [
            row("bfloat16", "highest", {"cuda": 5e-4, "eager": 2e-3}, **{"both peak": peaks}),
            row("float32", "high", {"triton": 1.2e-2}, commits={"triton": "d" * 40}),
            {"reason": "no"},
        ],
    }


def test_backends_stand_beside_each_other_and_eager(bench, kernel_results):
    kernel_results.with_name("backends.json").write_text(json.dumps(make_backend_run()))
    report, results = bench("report"), kernel_results.parent.parent
    kernels = report.kernels_section(results)
    shape = "dense `sci`, resnet50-448 B20 C2048 L196"
    assert f"| {shape}, bfloat16 | 0.125 / 0.500 | - | - | 0.500 / 2.000 | cuda |" in kernels
    assert f"| {shape}, float32, TF32 | - | 3.000 / 12.000 | - | - | matmul |" in kernels
    assert f"cuda, eager at {'c' * 12}; triton at {'d' * 12}." in kernels
    readme = report.readme_section(results)
    assert "forward + backward | GPU | cuda | 5.00 | - | 1.50 | 65 / 687 |" in readme


def test_the_readme_has_the_newest_gpu_and_the_document_all(bench, gpu_results):
    older = gpu_results.parent.with_name("older-gpu")
    older.mkdir()
    run = make_gpu_run() | {"device": "An older GPU", "date": "2025-12-31"}
    (older / "gpu.json").write_text(json.dumps(run))
    report = bench("report")
    assert "An older GPU" not in report.readme_section(older.parent)
    kernels = report.kernels_section(older.parent)
    assert kernels.index("A GPU,") < kernels.index("An older GPU,")


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
    assert "GPU: A GPU" in readme
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


@pytest.mark.parametrize(
    ("module", "program"),
    [
        ("gpu_report", "make gpu"),
        ("kernel_report", "bench/kernel_times.py"),
        ("backend_report", "bench/backends.py"),
    ],
)
@pytest.mark.parametrize("text", ["[]", "{}", '{"steps": [1], "case": {"width": 1}}'])
def test_a_file_of_something_else_is_named(bench, tmp_path, module, program, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: not written by {program}"):
        bench(module).load(path)
