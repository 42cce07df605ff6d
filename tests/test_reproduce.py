"""cin-fast-reproduce: every row trained once, finished ones skipped, and the table's numbers."""

import csv
import dataclasses
import json
import re
import statistics

import pytest
import torch
from small_run import SMALL, torchrun

from cin_fast import cost, reproduce
from cin_fast.config import TrainConfig
from cin_fast.flops import sci_flops
from cin_fast.models import METHODS, build_model
from cin_fast.reproduce import ROWS, Cost, Line, comma_separated, main, markdown, parse
from cin_fast.trainer import Trainer, TrainingError


def arguments(images, output, *more):
    options = [part for option in SMALL.items() for part in option]
    return ["table1", "--data-root", str(images), "--output", str(output), *options, *more]


def test_the_rows_are_the_papers():
    assert {row.method for row in ROWS.values()} == set(METHODS)
    assert (ROWS["cin"].paper_top1, ROWS["cin"].paper_ms) == (87.5, 17.2)
    assert (ROWS["plain"].paper_top1, ROWS["plain"].paper_ms) == (84.9, 12.5)


def test_another_backbone_leaves_out_rows_with_one_of_their_own():
    names = parse(["table1", "--backbone", "resnet18"]).rows
    assert set(names) == set(ROWS) - {"vgg19", "resnet101", "resnet101-cin"}
    assert parse(["table1"]).rows == tuple(ROWS)


@pytest.mark.slow
def test_two_rows_and_two_seeds(images, tmp_path, capsys, monkeypatch):
    output = tmp_path / "table"
    line = arguments(images, output, "--rows", "plain", "cin", "--seeds", "0", "5", "--epochs", "1")
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "4 runs, 0 of them finished" in printed
    assert "resnet18 + CIN, seed 5" in printed
    rows = list(csv.DictReader((output / "table1.csv").open()))
    assert [row["row"] for row in rows] == ["plain", "cin"]
    for row in rows:
        for seed in (0, 5):
            metrics = json.loads((output / f"{row['row']}-s{seed}" / "metrics.json").read_text())
            assert float(row[f"last_s{seed}"]) == pytest.approx(100 * metrics["test_top1"])
            assert metrics["seed"] == seed
        assert float(row["ms"]) > 0
    table = (output / "table1.md").read_text()
    assert "resnet18 + CIN" in table
    assert "seeds 0 5" in table

    monkeypatch.setattr(reproduce, "train", lambda config: pytest.fail("trained a finished run"))
    assert main(line) == 0
    assert "4 runs, 4 of them finished" in capsys.readouterr().out
    # Other settings under the same folder are not the same experiment.
    assert main([*line, "--lr", "0.5"]) == 2
    assert "was run with lr = 0.001, not 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_run_goes_on(images, tmp_path, capsys, monkeypatch):
    line = arguments(images, tmp_path, "--rows", "plain", "--seeds", "0", "--epochs", "2")
    plan = parse(line)
    config = plan.config("plain", 0)

    def stop(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        one_epoch = Trainer.one_epoch
        patch.setattr(
            Trainer, "one_epoch",
            lambda self, *loaders: stop(self) if self.epoch else one_epoch(self, *loaders),
        )  # fmt: skip
        assert main(line) == 130
    assert reproduce.finished(config) is None
    assert plan.config("plain", 0).resume
    assert main(line) == 0
    assert json.loads((tmp_path / "plain-s0" / "metrics.json").read_text())["epochs"] == 2


@pytest.mark.slow
def test_two_processes_share_each_run(images, tmp_path):
    more = ("--rows", "plain", "--seeds", "0", "1", "--epochs", "1")
    result = torchrun("cin_fast.reproduce", *arguments(images, tmp_path, *more))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("2 runs, 0 of them finished") == 1
    assert result.stdout.count("global batch 8 = 2 x 2 classes x 2 images") == 2
    assert "| resnet18 |" in (tmp_path / "table1.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows", "cinn"], "--rows: expected some of vgg19, .*found 'cinn'"),
        (["--seed", "3"], "--seed: cin-fast-reproduce sets it for each run itself"),
        (["--method=cin"], "--method: cin-fast-reproduce sets it"),
        (["--seeds", "1", "1"], "--seeds: expected each once, found 1 1"),
        (["--rows", "cin", "cin"], "--rows: expected each once, found cin cin"),
        (["--lr", "-1"], "--lr: expected above 0"),
        (["--data-root", "nowhere", "--dataset", "cub"], "nowhere"),
    ],
)
def test_what_it_refuses(images, tmp_path, capsys, more, message):
    assert main(arguments(images, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["seed", "method", "output", "resume"])
def test_a_file_sets_nothing_that_it_sets_itself(tmp_path, name):
    values = {"seed": 3, "method": "cin", "output": "runs/x", "resume": True}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"epochs": 2}))
    assert parse(["table1", "--config", str(file)]).base.epochs == 2
    file.write_text(json.dumps({"epochs": 2, name: values[name]}))
    with pytest.raises(ValueError, match=f"settings.json holds {name}, which .* remove it there"):
        parse(["table1", f"--config={file}"])


def test_an_unknown_option_is_this_commands(capsys):
    with pytest.raises(SystemExit):
        main(["table1", "--sed", "0"])
    assert "cin-fast-reproduce: error: unrecognized arguments: --sed" in capsys.readouterr().err


def test_other_settings_leave_those_of_the_table(images, tmp_path, capsys):
    folder = tmp_path / "plain-s0"
    folder.mkdir()
    (folder / "settings.json").write_text(TrainConfig(lr=0.5).to_json())
    (tmp_path / "table1.json").write_text("as it was")
    assert main(arguments(images, tmp_path, "--rows", "plain", "--seeds", "0")) == 2
    assert "was run with" in capsys.readouterr().err
    assert (tmp_path / "table1.json").read_text() == "as it was"


def table_of(tmp_path, plain_ms, cin_ms):
    plan = parse(["table1", "--seeds", "0", "1", "--output", str(tmp_path)])
    return plan, [
        Line("plain", "resnet50", (40.0, 44.0), (45.0, 46.0), Cost(10**6, 2 * 10**9, plain_ms)),
        Line("cin", "resnet50 + CIN", (47.0, 48.0), (49.0, 50.0), Cost(10**6, 10**9, cin_ms)),
    ]


def test_the_table_holds_means_deviations_and_ratios(tmp_path):
    text = markdown(*table_of(tmp_path, 10.0, 10.5))
    cells = [cell.strip() for cell in text.splitlines()[3].strip("|").split("|")]
    assert cells == [
        "resnet50 + CIN", "87.5", f"47.50 ± {statistics.stdev([47, 48]):.2f}", "49.50 ± 0.71",
        "+5.50", "1.0", "1.00", "10.50", "1.05", "1.38",
    ]  # fmt: skip


def test_plain_is_the_rows_own_backbone(tmp_path):
    plan, table = table_of(tmp_path, 10.0, 10.5)
    cost = Cost(10**6, 10**9, 20.0)
    table += [
        Line("resnet101", "resnet101", (46.0, 46.0), (46.0, 46.0), cost),
        Line("resnet101-cin", "resnet101 + CIN", (49.0, 49.0), (49.0, 49.0), cost),
    ]
    last = markdown(plan, table).splitlines()[5].strip("|").split("|")
    # 49 - 46, 20 / 20, 27.2 / 22.4.
    assert [last[i].strip() for i in (4, 8, 9)] == ["+3.00", "1.00", "1.21"]


def test_a_row_without_all_seeds_says_so(tmp_path):
    plan, table = table_of(tmp_path, 1.0, 1.0)
    table[1] = dataclasses.replace(table[1], last=(None, 47.0), best=(None, 49.0), cost=None)
    assert "47.00 (1 seed)" in markdown(plan, table)
    rows = list(csv.DictReader(comma_separated(plan, table).splitlines()))
    assert (rows[1]["last_s0"], rows[1]["last_s1"], rows[1]["best_s1"]) == ("", "47.0", "49.0")


def test_operations_are_counted_by_hand():
    plain, sci = (build_model(name, 10, "resnet18").eval() for name in ("plain", "sci"))
    device = torch.device("cpu")
    extra = cost.model_flops(sci, 64, device) - cost.model_flops(plain, 64, device)
    # At 64 pixels the map is 2 x 2: W from 4 positions, applied to 9 columns; then phi's means.
    assert extra == sci_flops((1, 512, 4), (1, 512, 9)) + 2 * 512 * 512 * 9
    # ResNet-18 at 224 pixels: 1.81 G multiply-adds (He et al.), 1.82 with the last layer.
    full = build_model("plain", 1000, "resnet18").eval()
    assert cost.model_flops(full, 224, device) == pytest.approx(2 * 1.814e9, rel=2e-3)


def test_a_lost_run_leaves_the_others_alone(images, tmp_path, capsys, monkeypatch):
    line = arguments(images, tmp_path, "--rows", "plain", "se", "--seeds", "0", "--epochs", "1")
    one_epoch = Trainer.one_epoch

    def lose_plain(self, *loaders):
        if self.config.method == "plain":
            raise TrainingError("the loss became nan in epoch 1; a lower --lr is the usual cure")
        return one_epoch(self, *loaders)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_epoch", lose_plain)
        assert main(line) == 1
    text = (tmp_path / "table1.md").read_text()
    assert "- resnet18, seed 0: the loss became nan in epoch 1\n" in text
    assert "resnet18 + SE" in text
    # It is tried again, alone.
    capsys.readouterr()
    assert main(line) == 0
    assert "2 runs, 1 of them finished" in capsys.readouterr().out
    assert "Not finished" not in (tmp_path / "table1.md").read_text()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", '{"epochs": 3', r"metrics\.json cannot be read as json"),
        ("metrics.json", "{}", r"metrics\.json lacks epochs: remove it"),
        ("settings.json", "[]", r"settings\.json holds no settings"),
    ],
)
def test_a_broken_record_is_named(images, tmp_path, capsys, file, text, message):
    folder = tmp_path / "plain-s0"
    folder.mkdir()
    (folder / file).write_text(text)
    assert main(arguments(images, tmp_path, "--rows", "plain", "--seeds", "0")) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
