"""Pictures of a trained model: what they show is what the operators say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cin_fast import checkpoint as checkpoints
from cin_fast import visualize
from cin_fast.config import TrainConfig
from cin_fast.models import build_model
from cin_fast.ops import sci_weights
from cin_fast.trained import load_trained
from cin_fast.visualize import complements, main, strongest_channels


def save_model(folder, method, classes=("a", "b", "c")):
    import dataclasses

    config = TrainConfig(method=method, backbone="resnet18", weights="none", image_size=64)
    model = build_model(method, len(classes), "resnet18")
    checkpoints.save(
        folder / "last.pt",
        checkpoints.Checkpoint(
            model=model.state_dict(),
            settings=dataclasses.asdict(config),
            classes=classes,
            epoch=1,
            optimizer={},
            schedule={},
            rng=torch.get_rng_state(),
            history={},
        ),
    )
    return model


@pytest.fixture
def images(tmp_path):
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.png")
        Image.effect_noise((80, 80), 90).convert("RGB").save(files[-1])
    return [str(file) for file in files]


def test_complements_are_the_largest_weights_of_the_row():
    x = torch.randn(6, 4, 4)
    row = sci_weights(x[None])[0, 2]
    order = [c for c in row.argsort(descending=True).tolist() if c != 2]
    assert complements(x, 2) == order[:3]


def test_strongest_channels():
    x = torch.tensor([1.0, 3.0, 2.0])[:, None, None].expand(3, 2, 2)
    assert strongest_channels(x, 2) == [1, 2]


def test_a_trained_model_comes_back_as_it_was(tmp_path):
    model = save_model(tmp_path, "cin").eval()
    trained = load_trained(tmp_path)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(trained.model(image), model(image))
    assert trained.classes == ("a", "b", "c")


@pytest.mark.parametrize(("method", "count"), [("plain", 1), ("sci", 2), ("cin", 3)])
def test_pictures_are_written(tmp_path, images, capsys, method, count):
    save_model(tmp_path, method)
    argv = [*images, "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    files = capsys.readouterr().out.split()
    assert len(files) == count
    for file in files:
        with Image.open(file) as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
            assert len(colours) > 100


def test_a_contrast_is_computed_where_the_model_lies(tmp_path, images, monkeypatch):
    save_model(tmp_path, "cin")
    trained = load_trained(tmp_path)
    found = []

    def cci(x, partner):
        found.append(x.device)
        return torch.zeros(x.shape)

    features = (np.zeros((64, 64, 3)), torch.zeros(512, 2, 2))
    monkeypatch.setattr(visualize, "_features", lambda *_: features)
    trained.model.cci.forward = cci
    elsewhere = replace(trained, device=torch.device("meta"))
    visualize.draw_pairs(elsewhere, [Path(name) for name in images], tmp_path / "pairs.png")
    assert found == [torch.device("meta")] * 2


def test_errors_are_one_line(tmp_path, images, capsys):
    out = ["--output", str(tmp_path / "out")]
    assert main([*images, "--checkpoint", str(tmp_path), *out]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    save_model(tmp_path, "cin")
    assert main([str(tmp_path / "gone.png"), "--checkpoint", str(tmp_path), *out]) == 2
    assert "gone.png" in capsys.readouterr().err
