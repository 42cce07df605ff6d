"""Settings: the paper's defaults, the command line, files, and what is refused."""

import json

import pytest

from cin_fast import config
from cin_fast.config import TrainConfig


def test_defaults_are_the_papers():
    c = TrainConfig()
    assert (c.image_size, c.epochs, c.classes_per_batch, c.images_per_class) == (448, 100, 4, 5)
    assert (c.lr, c.lr_step, c.lr_decay, c.momentum) == (0.001, 20, 0.5, 0.9)
    assert (c.weight_decay, c.alpha, c.margin, c.embedding_dim) == (2e-4, 2.0, 0.5, 512)
    assert (c.method, c.backbone, c.weights, c.batch_size) == ("cin", "resnet50", "imagenet", 20)


def test_options_have_the_names_of_the_settings():
    parsed = config.parse(["--image-size", "64", "--lr", "1e-2", "--no-pooled", "--resume"])
    assert (parsed.image_size, parsed.lr, parsed.pooled, parsed.resume) == (64, 0.01, False, True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "lr: 2e-2\nimage-size: 96\nbackbone: resnet18\n"),
        ("run.toml", 'lr = 0.02\nimage-size = 96\nbackbone = "resnet18"\n'),
        ("run.json", '{"lr": 0.02, "image_size": 96, "backbone": "resnet18"}'),
    ],
)
def test_a_file_gives_defaults_and_options_override(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    parsed = config.parse(["--config", str(path), "--lr", "0.5"])
    assert (parsed.lr, parsed.image_size, parsed.backbone) == (0.5, 96, "resnet18")


def test_json_reads_back():
    c = TrainConfig(lr=0.5, method="plain")
    assert config.from_mapping(json.loads(c.to_json())) == c


def test_what_was_done_with_an_earlier_run_is_not_recorded(tmp_path):
    """With --config, it would replace another run unasked."""
    (tmp_path / "settings.json").write_text(TrainConfig(overwrite=True).to_json())
    assert "resume" not in json.loads(TrainConfig(resume=True).to_json())
    again = config.parse(["--config", str(tmp_path / "settings.json")])
    assert (again.overwrite, again.resume) == (False, False)


def test_every_setting_is_printed():
    text = TrainConfig().describe()
    assert all(name in text for name in TrainConfig.__dataclass_fields__)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert "(default: 0.001)" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "--lr: expected above 0, found 0.0"),
        ({"lr": float("inf")}, "--lr: expected a number, found inf"),
        ({"epochs": 0}, "--epochs: expected at least 1"),
        ({"resume": True, "overwrite": True}, "--resume goes on with a run, --overwrite replaces"),
        ({"momentum": 1.0}, "--momentum"),
        ({"method": "nts"}, "--method: expected one of .*cin.*found 'nts'"),
        ({"dataset": "mnist"}, "--dataset: expected one of"),
        ({"classes_per_batch": 3, "images_per_class": 3}, "is odd: a batch of 9 cannot be split"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "learning_rate: 1", "unknown setting 'learning_rate'"),
        ("a.yaml", "1: 2", "unknown setting 1"),
        ("a.yaml", "epochs: many", "epochs expected int, found 'many'"),
        ("a.yaml", "lr: fast", "lr expected a number, found 'fast'"),
        ("a.yaml", f"lr: {'9' * 400}", "lr expected a number, found 999"),
        ("a.yaml", "resume: 1", "resume expected bool"),
        ("a.yaml", "- 1", "holds no settings"),
        ("a.yaml", "lr: 1\nepochs: 2\nlr: 3", r"a.yaml .*\(lr stands there twice; remove one\)"),
        ("a.yaml", "lr-step: 1\nlr_step: 2", "lr_step stands there twice"),
        ("a.json", '{"lr": 1, "lr": 2}', "lr stands there twice"),
        ("a.toml", "lr-step = 1\nlr_step = 2", "lr_step stands there twice"),
        ("a.txt", "lr: 1", r"expected .yaml, .toml or .json"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.parse(["--config", str(path)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--config: no file .*gone.yaml"):
        config.parse(["--config", str(tmp_path / "gone.yaml")])


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "lr: [1"), ("a.toml", "lr = "), ("a.json", '{"lr": ')]
)
def test_a_file_that_is_not_what_it_is_called_is_named_in_a_line(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as {name[2:]} \(") as caught:
        config.parse(["--config", str(path)])
    assert "\n" not in str(caught.value)


def test_resuming_takes_the_settings_of_the_run_however_it_is_named(tmp_path):
    (tmp_path / "settings.json").write_text(TrainConfig(lr=0.5).to_json())
    for output in (["--output", str(tmp_path)], [f"--output={tmp_path}"]):
        assert config.parse([*output, "--resume"]).lr == 0.5
        assert config.parse(output).lr == 0.001
        assert config.parse([*output, "--resume", "--lr", "0.25"]).lr == 0.25


def test_a_runs_folder_stands_for_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "none"):
        (tmp_path / name).mkdir()
    assert config.parse(["--weights", "run"]).weights == "run/last.pt"
    for weights in ("none", "imagenet", "run/last.pt", "w.pt"):
        assert config.parse(["--weights", weights]).weights == weights


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    settings = TrainConfig(epochs=7, data_root="~/d").to_json()
    (tmp_path / "run" / "settings.json").write_text(settings)
    c = config.parse(["--output=~/run", "--resume", "--weights=~/w.pt"])
    assert c.epochs == 7
    paths = (c.output, c.data_root, c.weights)
    assert paths == tuple(str(tmp_path / name) for name in ("run", "d", "w.pt"))


def test_resuming_without_a_folder_reads_no_settings_that_lie_about(tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text(TrainConfig(lr=0.5).to_json())
    monkeypatch.chdir(tmp_path)
    assert config.parse(["--resume"]).lr == 0.001
