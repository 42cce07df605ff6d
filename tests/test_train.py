"""cin-fast-train as a user meets it: a run, its folder, resuming, and what it refuses."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import arguments

from cin_fast import checkpoint as checkpoints
from cin_fast import config as configs
from cin_fast.data import ImageDataset
from cin_fast.distributed import World
from cin_fast.records import RunFolder
from cin_fast.train import Trainer, main, train
from cin_fast.trained import load_trained


def weights(folder):
    return checkpoints.load(Path(folder) / "last.pt").model


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_everything_in_its_folder(images, tmp_path, capsys):
    assert main(arguments(images, tmp_path / "run", epochs=2)) == 0
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["epochs"] == 2
    assert metrics["num_classes"] == 3
    assert 0 <= metrics["test_top1"] <= metrics["best_test_top1"] <= 1
    assert "optimistic" in metrics["best_test_top1_note"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    # 6 batches of 4: every image once, 12 pairs an epoch.
    assert all(line["positive_pairs"] + line["negative_pairs"] == 12 for line in lines)
    assert all(line["positive_pairs"] > 0 < line["negative_pairs"] for line in lines)
    environment = json.loads((folder / "environment.json").read_text())
    assert {"torch", "git commit", "command", "device"} <= set(environment)
    assert json.loads((folder / "settings.json").read_text())["image_size"] == 32
    assert list((folder / "tensorboard").iterdir())
    state = checkpoints.load(folder / "last.pt")
    assert {"h.weight", "cci.psi.weight", "sci.phi.weight"} <= set(state.model)
    digest, name = (folder / "last.pt.sha256").read_text().split()
    assert (digest, name) == (checkpoints.file_hash(folder / "last.pt"), "last.pt")
    out = capsys.readouterr().out
    assert "lr                0.001" in out
    assert "chance 33.33%" in out


def test_the_loss_falls(images, tmp_path):
    train(configs.parse(arguments(images, tmp_path, epochs=4, method="plain", lr=0.002)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_same_seed_gives_the_same_bits_whatever_loads_the_images(images, tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        train(configs.parse(arguments(images, tmp_path / name, epochs=1, workers=workers)))
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    train(configs.parse(arguments(images, tmp_path / "three", epochs=1, seed=1)))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "three"))


@pytest.fixture(scope="module")
def four_epochs(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    train(configs.parse(arguments(images, folder, epochs=4, lr_step=2)))
    return folder


def test_the_learning_rate_is_halved_every_lr_step_epochs(four_epochs):
    lines = [json.loads(s) for s in (four_epochs / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.001, 0.001, 0.0005, 0.0005]


def test_two_and_two_epochs_are_four_to_the_bit(images, four_epochs, tmp_path):
    train(configs.parse(arguments(images, tmp_path, epochs=2, lr_step=2)))
    assert main(["--output", str(tmp_path), "--resume", "--epochs", "4"]) == 0
    assert same(weights(tmp_path), weights(four_epochs))
    epochs = [json.loads(s)["epoch"] for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]


def test_one_and_one_epoch_in_float16_are_two_to_the_bit(images, tmp_path):
    """The loss's scale goes on where it was; its first steps overflow and are left out."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    train(configs.parse(arguments(images, whole, epochs=2, amp="fp16")))
    train(configs.parse(arguments(images, parts, epochs=1, amp="fp16")))
    assert checkpoints.load(parts / "last.pt").scaler["scale"] < 2.0**16
    assert main(["--output", str(parts), "--resume", "--epochs", "2"]) == 0
    assert same(weights(parts), weights(whole))
    assert all(t.isfinite().all() for t in weights(whole).values())
    scalers = [checkpoints.load(one / "last.pt").scaler for one in (parts, whole)]
    assert scalers[0] == scalers[1]


def test_a_checkpoint_from_before_scales_were_kept_is_read(four_epochs, tmp_path):
    content = torch.load(four_epochs / "last.pt", weights_only=True)
    assert content.pop("scaler") == {}
    torch.save(content, tmp_path / "last.pt")
    assert checkpoints.load(tmp_path / "last.pt").scaler == {}


def test_a_checkpoint_of_a_later_version_is_refused(four_epochs, tmp_path):
    content = torch.load(four_epochs / "last.pt", weights_only=True)
    torch.save(content | {"ema": {}}, tmp_path / "last.pt")
    with pytest.raises(checkpoints.CheckpointError, match="holds ema, which this version does not"):
        checkpoints.load(tmp_path / "last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits(images, four_epochs, tmp_path, stop, moment):
    command = [sys.executable, "-m", "cin_fast.train"]
    command += arguments(images, tmp_path, epochs=4, lr_step=2)
    process = subprocess.Popen(
        command,
        # The same bits need the same number of threads.
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    last = tmp_path / "last.pt"
    while not last.exists() or len(lines.read_text().splitlines()) < moment:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    if stop == signal.SIGTERM:
        assert "--resume goes on" in error
        assert "Traceback" not in error
    checkpoints.load(tmp_path / "last.pt")
    assert main(["--output", str(tmp_path), "--resume"]) == 0
    assert same(weights(tmp_path), weights(four_epochs))


def test_an_interrupt_does_not_break_into_the_curves(tmp_path, monkeypatch):
    """It could leave TensorBoard's queue locked, and the run would never end."""
    drawn = []

    def add_scalar(self, name, *_):
        signal.raise_signal(signal.SIGINT)
        drawn.append(name)

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", add_scalar)
    curves = RunFolder(tmp_path).curves(active=True)
    with pytest.raises(KeyboardInterrupt), curves as draw:
        draw({"epoch": 1, "loss": 2.0, "lr": 0.1})
    assert drawn == ["loss", "lr"]


def refusal(capsys, argv):
    code = main(argv)
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes_per_batch": 4}, "4"),
        ({"image_size": 16}, "smaller than the stride of resnet18 (32)"),
        ({"weights": "/nowhere/w.pt"}, "no file /nowhere/w.pt"),
        ({"data_root": "/nowhere"}, "/nowhere"),
        ({"dataset": "cub", "data_root": "/nowhere"}, "/nowhere"),
        ({"device": "cuda:9"}, "--device"),
        ({"device": "tpu9"}, "--device: expected auto, cpu, cuda"),
        ({"backbone": "resnet19"}, "resnet19"),
        ({"backend": "cuda"}, "'cuda' cannot run here"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(images, tmp_path, capsys, changes, message):
    assert message in refusal(capsys, arguments(images, tmp_path, epochs=1, **changes))
    assert not (tmp_path / "last.pt").exists()


def test_a_run_is_not_overwritten_unasked(images, tmp_path, capsys):
    argv = arguments(images, tmp_path, epochs=1)
    assert main(argv) == 0
    assert "already holds a run" in refusal(capsys, argv)
    assert main([*argv, "--overwrite"]) == 0


def test_what_cannot_work_leaves_the_run_that_it_would_replace(images, tmp_path, capsys):
    assert main(arguments(images, tmp_path, epochs=1)) == 0
    argv = arguments(images, tmp_path, epochs=1, backend="cuda")
    assert "'cuda' cannot run here" in refusal(capsys, [*argv, "--overwrite"])
    assert (tmp_path / "last.pt").exists()


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    def hold(pipe):
        folder = RunFolder(tmp_path)
        folder.open()
        pipe.send("held")
        pipe.recv()

    ours, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(theirs,), daemon=True)
    other.start()
    assert ours.recv() == "held"
    with pytest.raises(ValueError, match="another process trains in"):
        RunFolder(tmp_path).open()
    ours.send("end")
    other.join()
    RunFolder(tmp_path).open()
    assert (tmp_path / ".lock").stat().st_mode & 0o111 == 0


def test_resume_refuses_other_settings_and_broken_files(images, tmp_path, capsys):
    argv = arguments(images, tmp_path, epochs=1)
    assert "no checkpoint" in refusal(capsys, [*argv, "--resume"])
    assert main(argv) == 0
    other = arguments(images, tmp_path, epochs=2, lr=0.5)
    assert "lr = 0.001, not 0.5" in refusal(capsys, [*other, "--resume"])
    assert main(["--output", str(tmp_path), "--resume", "--epochs", "2"]) == 0
    capsys.readouterr()
    settings = (tmp_path / "settings.json").read_text()
    assert "has 2 already, more than 1" in refusal(capsys, [*argv, "--resume"])
    assert (tmp_path / "settings.json").read_text() == settings
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    for kept in (len(whole) - 1000, 20_000):
        path.write_bytes(whole[:kept])
        error = refusal(capsys, [*argv, "--resume"])
        assert "is damaged: its hash is not the one" in error


def test_an_unwritable_output_is_refused(images, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in refusal(capsys, arguments(images, file / "run", epochs=1))


def test_a_loss_that_is_no_number_stops_with_the_files(images, tmp_path, capsys):
    code = main(arguments(images, tmp_path, epochs=3, lr=1e12))
    error = capsys.readouterr().err
    assert code == 2
    assert "the loss became" in error
    assert str(images / "train") in error


def test_a_divergence_in_the_last_step_stops_before_it_is_kept(images, tmp_path, capsys):
    # One step an epoch: no loss is computed after it.
    sizes = {"classes_per_batch": 3, "images_per_class": 8}
    assert main(arguments(images, tmp_path, epochs=1, lr=1e38, **sizes)) == 2
    error = capsys.readouterr().err
    assert "the model's logits are not finite after epoch 1" in error
    assert "there is no checkpoint yet" in error


def test_what_is_replaced_stays_until_an_epoch_is_finished(images, tmp_path, monkeypatch, capsys):
    assert main(arguments(images, tmp_path, epochs=1)) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def stopped(*_):
        raise KeyboardInterrupt

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for owner, name, broken, code, message in (
        (Trainer, "_step", stopped, 130, "stopped; no epoch was finished, and the run that"),
        (torch, "save", full, 2, "the one before it is intact"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, broken)
            assert main([*arguments(images, tmp_path, epochs=1, seed=1), "--overwrite"]) == code
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "evaluation").mkdir()
    assert main([*arguments(images, tmp_path, epochs=2, seed=1), "--overwrite"]) == 0
    assert checkpoints.load(tmp_path / "last.pt").settings["seed"] == 1
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert not (tmp_path / "evaluation").exists()


def test_a_test_that_fails_costs_no_epoch(images, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configs.parse(arguments(images, whole, epochs=2)))

    def broken(*_):
        raise ValueError("a.jpg is truncated; --skip-bad-images leaves it out")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "test", broken)
        assert main(arguments(images, parts, epochs=2)) == 2
    assert checkpoints.load(parts / "last.pt").epoch == 1
    assert main(["--output", str(parts), "--resume", "--skip-bad-images"]) == 0
    assert same(weights(parts), weights(whole))
    # The test is made up for.
    lines = [
        [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (parts, whole)
    ]
    for line, expected in zip(*lines, strict=True):
        assert line["test_top1"] == expected["test_top1"]
        assert line.keys() == expected.keys()
    best = [checkpoints.load(folder / "last.pt").history for folder in (parts, whole)]
    assert best[0]["best_test_top1"] == best[1]["best_test_top1"]


def test_lost_lines_cost_no_run(images, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "test", stopped)
        assert main(arguments(images, tmp_path, epochs=2)) == 130
    (tmp_path / "metrics.jsonl").unlink()
    assert main(["--output", str(tmp_path), "--resume"]) == 0
    assert re.search(r"^epoch   1/2  test [\d.]+%$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(("owner", "name"), [(RunFolder, "record"), (Trainer, "save")])
def test_a_kill_at_line_or_checkpoint_leaves_one_line_an_epoch(
    images, tmp_path, monkeypatch, owner, name
):
    write, calls = getattr(owner, name), []

    def killed(*arguments):
        calls.append(arguments)
        # Each epoch is kept twice, before its test and after.
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        assert main(arguments(images, tmp_path, epochs=3)) == 130
    assert main(["--output", str(tmp_path), "--resume"]) == 0
    lines = [json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all("test_top1" in line for line in lines)


def test_a_run_goes_on_with_as_many_processes(four_epochs, tmp_path, capsys):
    shutil.copytree(four_epochs, tmp_path / "run")
    one = checkpoints.load(four_epochs / "last.pt")
    assert one.history["processes"] == 1
    two = dataclasses.replace(one, history=one.history | {"processes": 2})
    checkpoints.save(tmp_path / "run" / "last.pt", two)
    error = refusal(capsys, ["--output", str(tmp_path / "run"), "--resume", "--epochs", "5"])
    assert "last.pt was trained by 2 processes, not 1" in error


def test_what_was_asked_of_the_folder_does_not_come_back(four_epochs, tmp_path):
    one = checkpoints.load(four_epochs / "last.pt")
    assert not {"resume", "overwrite"} & set(one.settings)
    # Earlier versions recorded both, and allowed both at once.
    both = dataclasses.replace(one, settings=one.settings | {"resume": True, "overwrite": True})
    checkpoints.save(tmp_path / "last.pt", both)
    assert load_trained(tmp_path).config.epochs == 4


def test_a_full_disk_leaves_the_last_checkpoint(images, tmp_path, capsys, monkeypatch):
    assert main(arguments(images, tmp_path, epochs=1)) == 0
    before = checkpoints.file_hash(tmp_path / "last.pt")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    error = refusal(capsys, ["--output", str(tmp_path), "--resume", "--epochs", "2"])
    assert "No space left on device" in error
    assert "the one before it is intact" in error
    assert checkpoints.file_hash(tmp_path / "last.pt") == before


def test_a_disk_too_small_is_refused_before_training(images, tmp_path, capsys, monkeypatch):
    assert main(arguments(images, tmp_path, epochs=1)) == 0
    capsys.readouterr()
    taken = (tmp_path / "last.pt").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    # Settings, the random state and names of tensors come on top, some kilobytes.
    for free, enough in ((taken, True), (taken - 200_000, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        argv = ["--output", str(tmp_path), "--resume", "--epochs", "2"]
        if enough:
            Trainer(configs.parse(argv), World(0, 1, 0))
        else:
            assert re.search(r"has \d+ MB free, checkpoints need \d+", refusal(capsys, argv))
    assert "MB free" in refusal(capsys, arguments(images, tmp_path / "new", epochs=1))


def test_a_bad_image_is_named_or_skipped(images, tmp_path, capsys):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(images, root)
    broken = root / "train" / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    argv = arguments(root, tmp_path / "run", epochs=1, workers=1)
    error = refusal(capsys, argv)
    assert str(broken) in error
    assert "--skip-bad-images" in error
    assert main([*argv, "--skip-bad-images", "--overwrite"]) == 0
    assert str(broken) in capsys.readouterr().out


def test_files_that_are_left_out_for_their_names_are_counted(images, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(images, root)
    (root / "test" / "red" / "photo.heic").write_bytes(b"?")
    assert main(arguments(root, tmp_path / "run", epochs=1)) == 0
    assert "left out 1 file by its name: 1 .heic\n" in capsys.readouterr().out


def test_a_runs_folder_gives_weights(four_epochs, images, tmp_path, capsys):
    assert main(arguments(images, tmp_path / "run", epochs=1, weights=four_epochs)) == 0
    recorded = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert recorded["weights"] == str(four_epochs / "last.pt")
    empty = tmp_path / "empty"
    empty.mkdir()
    error = refusal(capsys, arguments(images, tmp_path / "other", epochs=1, weights=empty))
    assert f"no file {empty / 'last.pt'}" in error


def test_a_worker_that_dies_is_one_line(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        ImageDataset, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    error = refusal(capsys, arguments(images, tmp_path, epochs=1, workers=1))
    assert "a process that loads images died" in error


@pytest.mark.parametrize("method", ["plain", "sci-cont"])
def test_other_methods_train(images, tmp_path, method):
    metrics = train(configs.parse(arguments(images, tmp_path, epochs=1, method=method)))
    assert metrics["method"] == method


def test_bf16_autocast_and_compile_settings_train(images, tmp_path):
    metrics = train(configs.parse(arguments(images, tmp_path, epochs=1, amp="bf16")))
    assert metrics["epochs"] == 1


def test_a_profile_is_written(images, tmp_path):
    argv = [*arguments(images, tmp_path, epochs=2), "--profile"]
    assert main(argv) == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_model_takes_the_default_backend(images, tmp_path):
    config = configs.parse(arguments(images, tmp_path, epochs=1))
    trainer = Trainer(config, World(0, 1, 0))
    assert trainer.model.sci.backend is None


def test_each_epoch_draws_its_own_batches(images, tmp_path):
    trainer = Trainer(configs.parse(arguments(images, tmp_path, epochs=2)), World(0, 1, 0))
    trainer.epoch = 1
    trainer.train_epoch(trainer._train_loader())
    assert trainer.batches.epoch == trainer.batches.pairs.epoch == 1
