"""Scores, the report behind cin-fast-eval, and cin-fast-predict."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import warnings

import pytest
import torch
from small_run import arguments
from torch import nn

from cin_fast import checkpoint as checkpoints
from cin_fast.evaluate import main, report, write_confusion
from cin_fast.predict import main as predict_main
from cin_fast.scores import Scores, score
from cin_fast.train import main as train_main
from cin_fast.trained import load_trained


class Fixed(nn.Module):
    """Logits that the input carries."""

    def forward(self, x):
        return x


def test_scores_by_hand():
    logits = torch.eye(6)[[0, 1, 1, 5]] * 2 - torch.arange(6) * 0.1
    batches = [(logits[:3], torch.tensor([0, 1, 2])), (logits[3:], torch.tensor([4]))]
    scores = score(Fixed(), batches, 6, torch.device("cpu"), contextlib.nullcontext())
    assert (scores.images, scores.top1) == (4, 0.5)
    # Image 3 puts 5 first, then 0 to 3: its class 4 comes sixth.
    assert scores.top5 == 0.75
    assert scores.confusion[2, 1] == scores.confusion[4, 5] == 1
    assert scores.per_class[:3].tolist() == [1.0, 1.0, 0.0]
    assert math.isnan(scores.per_class[3])
    assert scores.confused == [(2, 1, 1), (4, 5, 1)]


def test_evaluation_leaves_the_mode_as_it_was():
    model = Fixed().train()
    score(model, [], 2, torch.device("cpu"), contextlib.nullcontext())
    assert model.training


def test_report_is_json():
    scores = Scores(torch.tensor([[3, 1], [0, 0]]), 1.0, 4, 2.0)
    summary = json.loads(json.dumps(report(scores, ["a", "b"])))
    assert summary["per_class"] == {"a": 0.75, "b": None}
    assert summary["most_confused"] == [{"true": "a", "predicted": "b", "images": 1}]
    assert summary["ms_per_image"] == 500


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train_main(arguments(images, folder, epochs=1, method="sci")) == 0
    return folder


def test_eval_agrees_with_training(run, tmp_path, capsys):
    trained = json.loads((run / "metrics.json").read_text())
    argv = [str(run), "--workers", "0", "--device", "cpu", "--output", str(tmp_path)]
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["test_top1"] == trained["test_top1"]
    assert summary["images"] == 12
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    rows = (tmp_path / "confusion.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["blue", "green", "red"]
    assert sum(int(cell) for row in rows[1:] for cell in row.split(",")[1:]) == 12
    assert main(argv) == 0
    assert "most confused:" in capsys.readouterr().out


def test_the_matrix_lies_in_the_runs_folder(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for checkpoint in (run, run / "last.pt"):
        assert main([str(checkpoint), "--workers", "0", "--device", "cpu"]) == 0
        (run / "evaluation" / "confusion.png").unlink()
        shutil.rmtree(run / "evaluation")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("$10 bill", r"$\frac$"), ("麻雀", "燕子")])
def test_any_name_is_a_label(tmp_path, names):
    scores = Scores(torch.eye(2, dtype=torch.int64), 1.0, 2, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_confusion(scores, names, tmp_path)
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_a_run_may_be_named_by_a_string(run):
    assert load_trained(str(run)).classes == ("blue", "green", "red")


def test_a_full_disk_does_not_cost_the_result(run, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    argv = [str(run), "--workers", "0", "--device", "cpu", "--output", str(tmp_path)]
    assert main(argv) == 2
    found = capsys.readouterr()
    assert "top-1" in found.out
    assert "confusion.csv could not be written (No space left on device)" in found.err


def test_predict_names_classes(run, images, capsys):
    picture = images / "test" / "red" / "0.png"
    argv = [str(picture), "--checkpoint", str(run), "--device", "cpu"]
    capsys.readouterr()
    assert predict_main([*argv, "--json", "--top", "2"]) == 0
    best = json.loads(capsys.readouterr().out)[str(picture)]
    assert len(best) == 2
    assert set(best) <= {"red", "green", "blue"}
    assert predict_main(argv) == 0
    assert capsys.readouterr().out.count("%") == 3


def test_predict_goes_on_after_a_bad_image(run, images, tmp_path, capsys):
    first, last = (str(images / "test" / "red" / f"{number}.png") for number in (0, 1))
    argv = [first, str(tmp_path / "gone.png"), last, "--checkpoint", str(run), "--device", "cpu"]
    capsys.readouterr()
    assert predict_main(argv) == 2
    found = capsys.readouterr()
    assert [line for line in found.out.splitlines() if "%" not in line] == [first, last]
    assert found.err == f"cin-fast-predict: error: {tmp_path / 'gone.png'} is missing\n"
    assert predict_main([*argv, "--json"]) == 2
    found = capsys.readouterr()
    assert list(json.loads(found.out)) == [first, last]
    assert found.err == f"cin-fast-predict: error: {tmp_path / 'gone.png'} is missing\n"


def test_a_bar_is_drawn_on_a_terminal_alone(run, images, capsys, monkeypatch):
    argv = [str(images / "test" / "red"), "--checkpoint", str(run), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert predict_main(argv) == main([str(run), "--workers", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert predict_main(argv) == main([str(run), "--workers", "0", "--device", "cpu"]) == 0
    err = capsys.readouterr().err
    assert "predicting" in err
    assert "evaluating" in err


def test_predict_takes_folders(run, images, tmp_path, capsys):
    picture = images / "test" / "red" / "0.png"
    for name in ("b.png", "a/2.PNG", "a/1.jfif", "a/.x.png", ".cache/3.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    argv = ["--checkpoint", str(run), "--device", "cpu", "--json", str(picture)]
    capsys.readouterr()
    assert predict_main([*argv, str(tmp_path)]) == 0
    named = list(json.loads(capsys.readouterr().out))
    below = [str(tmp_path / name) for name in ("a/1.jfif", "a/2.PNG", "b.png")]
    assert named == [str(picture), *below]
    (tmp_path / "empty").mkdir()
    assert predict_main([*argv, str(tmp_path / "empty")]) == 2
    found = capsys.readouterr()
    assert not found.out
    assert f"{tmp_path / 'empty'} holds no image" in found.err


def test_predict_shows_each_image_as_it_comes(run, images, capsys, monkeypatch):
    import cin_fast.predict as predicting

    first, last = (images / "test" / "red" / f"{number}.png" for number in (0, 1))
    predict, shown = predicting.predict, []

    def watched(trained, path, count):
        shown.append(capsys.readouterr().out)
        return predict(trained, path, count)

    monkeypatch.setattr(predicting, "predict", watched)
    capsys.readouterr()
    assert predict_main([str(first), str(last), "--checkpoint", str(run), "--device", "cpu"]) == 0
    assert [str(first) in text for text in shown] == [False, True]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_lost_checkpoint_is_named_instead_of_nan(run, images, tmp_path, capsys, options):
    state = checkpoints.load(run / "last.pt")
    next(iter(state.model.values())).fill_(math.nan)
    checkpoints.save(tmp_path / "last.pt", state)
    picture = str(images / "test" / "red" / "0.png")
    capsys.readouterr()
    assert predict_main([picture, "--checkpoint", str(tmp_path), "--device", "cpu", *options]) == 2
    found = capsys.readouterr()
    assert not found.out
    assert f"cin-fast-predict: error: {tmp_path}: its logits for {picture} are not" in found.err


def test_errors_are_one_line(run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert predict_main(["x.png", "--checkpoint", str(run), "--device", "cpu"]) == 2
    assert main([str(run), "--data-root", str(tmp_path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 3
    assert "no checkpoint" in error
    assert "x.png" in error


def test_a_bad_image_is_a_line_or_left_out(run, images, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(images, root)
    broken = root / "test" / "red" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    argv = [str(run), "--data-root", str(root), "--device", "cpu", "--output", str(tmp_path)]
    capsys.readouterr()
    assert main([*argv, "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert f"cin-fast-eval: error: {broken} cannot be read" in error
    assert "Traceback" not in error
    assert main([*argv, "--workers", "0", "--json", "--skip-bad-images"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 11
    assert str(broken) in captured.err
