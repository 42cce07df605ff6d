"""Every command: an error is one line that names the thing and the fix, never a traceback."""

import builtins
import contextlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from small_run import arguments
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cin_fast import command, demo
from cin_fast.config import TrainConfig
from cin_fast.data.cli import main as data
from cin_fast.distributed import ElsewhereError
from cin_fast.evaluate import main as evaluate
from cin_fast.export import main as export
from cin_fast.predict import main as predict
from cin_fast.records import RunFolder
from cin_fast.reproduce import main as reproduce
from cin_fast.scores import score
from cin_fast.train import TrainingError
from cin_fast.train import main as train
from cin_fast.visualize import main as visualize

COMMANDS = {
    "train": train, "eval": evaluate, "predict": predict, "visualize": visualize, "data": data,
    "export": export, "reproduce": reproduce,
}  # fmt: skip


def outcome(capsys, error, **options):
    def body():
        raise error

    code = command.run("cin-fast-x", body, **options)
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    return code, captured.removeprefix("cin-fast-x: error: ").strip()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("--lr: expected above 0"), "--lr: expected above 0"),
        (OSError(28, "No space left on device", "runs/a"), "runs/a: No space left on device"),
        (FileNotFoundError("weights: no file w.pt"), "weights: no file w.pt"),
        (ImportError("ONNX needs onnx"), "ONNX needs onnx"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory (CUDA out of memory"),
        (MemoryError(), "out of memory (out of memory); try a smaller --image-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory ("),
        (RuntimeError("DataLoader worker (pid 1) is killed"), "a process that loads images died"),
    ],
)
def test_an_error_is_one_line(capsys, error, message):
    code, line = outcome(capsys, error)
    assert code == 2
    assert line.startswith(message)


def test_a_stop_says_how_to_go_on(capsys):
    line = outcome(capsys, KeyboardInterrupt(), left=lambda: "go on with x")
    assert line == (130, "stopped; go on with x")


def test_a_signal_to_the_whole_group_is_a_stop(capsys):
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
    assert outcome(capsys, error) == (130, "stopped")


@pytest.mark.parametrize(("target", "code"), [("closed pipe", 141), ("/dev/full", 2)])
def test_output_that_nobody_takes_ends_without_a_traceback(target, code):
    if target.startswith("/dev") and not os.path.exists(target):
        pytest.skip(f"no {target}")
    command = [sys.executable, "-m", "cin_fast.data.cli", "list"]
    if target == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(target, os.O_WRONLY)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == code
    assert done.stderr.count("\n") == (code == 2)
    assert "Exception ignored" not in done.stderr


def test_without_an_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert command.run("cin-fast-x", lambda: 0) == 0


def test_what_another_process_says_is_not_said_again(capsys):
    def body():
        raise ElsewhereError("the main process says why")

    assert command.run("cin-fast-x", body) == 2
    assert capsys.readouterr().err == ""


def test_a_data_workers_own_error_is_no_lack_of_memory():
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback: a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        command.run("cin-fast-x", lambda: (_ for _ in ()).throw(error))


def test_sigterm_is_a_stop(capsys):
    def body():
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert command.run("cin-fast-x", body) == 130
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_of_ours_keeps_its_traceback():
    def body():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        command.run("cin-fast-x", body)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("--epochs: expected at least 1, found 0"), 2, "error: --epochs: expected at"),
        (TrainingError("the loss is nan"), 2, "error: the loss is nan"),
        (KeyboardInterrupt(), 130, "error: stopped"),
    ],
)
def test_the_demo_is_a_command_as_the_others(capsys, monkeypatch, error, code, message):
    def train(_):
        raise error

    monkeypatch.setattr(demo, "train", train)
    assert demo.main([]) == code
    assert capsys.readouterr().err.startswith(f"python -m cin_fast.demo: {message}")


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("a.jpg is truncated; replace it")


def test_what_a_data_worker_says_comes_without_its_traceback(capsys):
    code = command.run("cin-fast-x", lambda: len(list(DataLoader(Broken(), num_workers=1))))
    assert code == 2
    assert capsys.readouterr().err == "cin-fast-x: error: a.jpg is truncated; replace it\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_worth_reading(capsys, name):
    with pytest.raises(SystemExit) as caught:
        COMMANDS[name](["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith(f"usage: cin-fast-{name}")
    # What it does, in a sentence, stands before the options.
    assert "." in text.partition("\n\n")[2].partition("\n\n")[0]


@pytest.mark.parametrize("name", ["train", "eval", "predict", "visualize"])
def test_the_same_option_reads_the_same(capsys, name):
    with pytest.raises(SystemExit):
        COMMANDS[name](["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--device NAME auto, cpu, cuda or cuda:N (default: auto)" in text
    assert name == "train" or "last.pt, or a run's folder" in text
    assert name == "predict" or "--output DIR" in text
    assert "example: cin-fast-" in text


def test_a_default_of_zero_is_shown(capsys):
    with pytest.raises(SystemExit):
        train(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "as the paper does (default: 0.0)" in text
    assert "sampling and augmentation (default: 0)" in text


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train(arguments(images, folder, epochs=1)) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("predict", ["--top", "0", "IMAGE"], "--top: expected 1 or more, found 0"),
        ("eval", ["--batch-size", "0"], "--batch-size: expected 1 or more, found 0"),
        ("eval", ["--workers", "-1"], "--workers: expected 0 or more, found -1"),
        ("eval", ["--output", "IMAGE"], "File exists"),
        ("eval", ["--dataset", "synthetic"], "knows 3 classes, the dataset has 12"),
        ("visualize", ["--device", "abacus", "IMAGE"], "--device: expected auto, cpu, cuda"),
        ("visualize", ["--device", "meta", "IMAGE"], "--device: expected auto, cpu, cuda"),
        ("visualize", ["--output", "IMAGE", "IMAGE"], "File exists"),
        ("predict", ["FOLDER/a.pt2"], "a.pt2 holds no image: name one that does"),
        ("visualize", ["FOLDER"], "is a folder: name a few images in it"),
        ("export", ["--output", "a.txt"], "expected .onnx or .pt2, found 'a.txt'"),
        ("export", ["--output", "IMAGE/a.onnx"], "File exists"),
        ("export", ["--output", "FOLDER/a.pt2"], "a.pt2 is a folder"),
        ("eval", ["--output", "/proc"], "--output: /proc cannot be written"),
        ("visualize", ["--output", "/proc", "IMAGE"], "--output: /proc cannot be written"),
        ("export", ["--output", "/proc/a.pt2"], "--output: /proc cannot be written"),
    ],
)
def test_wrong_arguments_after_training(run, images, capsys, name, argv, message):
    picture = str(images / "test" / "red" / "0.png")
    (images / "a.pt2").mkdir(exist_ok=True)
    argv = [a.replace("IMAGE", picture).replace("FOLDER", str(images)) for a in argv]
    checkpoint = ["--checkpoint", str(run)] if name in ("predict", "visualize") else [str(run)]
    try:
        code = COMMANDS[name]([*checkpoint, *argv])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "--skip-bad-images" not in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_seed_too_large_for_the_samplers_is_refused():
    TrainConfig(seed=10**8)
    with pytest.raises(ValueError, match="--seed: expected 0 to 100000000, found 100000001"):
        TrainConfig(seed=10**8 + 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_what_must_not_be_interrupted(number):
    def interrupt(*_):
        raise KeyboardInterrupt

    def body():
        with command.uninterrupted():
            signal.raise_signal(number)
            done.append(True)

    before, done = signal.signal(number, interrupt), []
    try:
        with pytest.raises(KeyboardInterrupt):
            body()
        assert done
        assert signal.getsignal(number) is interrupt
        with command.uninterrupted():
            pass
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("package", ["torchmetrics.classification", "torch.utils.tensorboard"])
def test_an_interrupt_that_an_import_passes_over_is_heard(tmp_path, monkeypatch, package):
    real = builtins.__import__

    def importing(name, *others):
        if name == package:
            # As some packages do around what they can do without.
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGINT)
        return real(name, *others)

    def counted():
        score(nn.Linear(2, 3), [], 3, torch.device("cpu"), contextlib.nullcontext())

    def drawn():
        with RunFolder(tmp_path).curves(active=True):
            pass

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(KeyboardInterrupt):
        counted() if package.startswith("torchmetrics") else drawn()
