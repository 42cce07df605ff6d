"""The whole way on real photographs: read, train, evaluate, predict, draw; kernels on real maps."""

import json

import pytest
import torch

from cin_fast.data import build_dataset
from cin_fast.evaluate import main as evaluate
from cin_fast.models import CIN
from cin_fast.models.backbones import build_backbone
from cin_fast.predict import main as predict
from cin_fast.testing import assert_exact_as_torch, check_sci, evaluate_cci, make_pairs
from cin_fast.train import main as train
from cin_fast.visualize import main as visualize

CLASSES = 4
IMAGES = 6


def read_table(path):
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines())


@pytest.fixture(scope="module")
def few(grocery_root, tmp_path_factory):
    """The first classes, with a few photographs of each split, in the same layout."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "images").symlink_to(grocery_root / "images")
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    tables = {name: read_table(grocery_root / name) for name in names}
    kept = []
    for label in map(str, range(1, CLASSES + 1)):
        for split in "10":
            ids = [
                number
                for number, one in tables["image_class_labels.txt"].items()
                if one == label and tables["train_test_split.txt"][number] == split
            ]
            kept += ids[:IMAGES]
    for name, table in tables.items():
        keys = list(map(str, range(1, CLASSES + 1))) if name == "classes.txt" else kept
        (root / name).write_text("".join(f"{key} {table[key]}\n" for key in keys))
    return root


@pytest.fixture(scope="module")
def batch(few):
    """Eight photographs, two of each class, at 128 pixels."""
    photographs = build_dataset("cub", few, train=False, image_size=128)
    chosen = [label * IMAGES + number for label in range(CLASSES) for number in range(2)]
    return torch.stack([photographs[index][0] for index in chosen])


@pytest.mark.slow
def test_train_evaluate_predict_and_draw(few, tmp_path, capsys):
    run = tmp_path / "run"
    options = (
        f"--dataset cub --data-root {few} --method cin --backbone resnet18 --image-size 64 "
        f"--weights none --epochs 2 --classes-per-batch 2 --images-per-class 4 --lr 0.002 "
        f"--workers 1 --device cpu --output {run}"
    )
    assert train(options.split()) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["num_classes"], metrics["dataset"]) == (CLASSES, "cub")
    capsys.readouterr()

    assert evaluate([str(run), "--output", str(tmp_path), "--workers", "0", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == CLASSES * IMAGES
    assert scores["test_top1"] == pytest.approx(metrics["test_top1"])

    photographs = sorted((few / "images").glob("00[1-3]*/test_*.jpg"))[:3]
    assert predict([*map(str, photographs[:1]), "--checkpoint", str(run)]) == 0
    assert "Golden-Delicious" in capsys.readouterr().out
    pictures = tmp_path / "pictures"
    names = [*map(str, photographs), "--checkpoint", str(run), "--output", str(pictures)]
    assert visualize(names) == 0
    assert len(list(pictures.glob("*.png"))) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_the_maps_of_photographs(batch, cpu_extension, dtype):
    torch.manual_seed(0)
    with torch.inference_mode():
        x_BCL = build_backbone("resnet18")(batch[:4]).flatten(2)
    x_BCL = x_BCL.clone().to(dtype)
    dy_BCL = torch.randn(x_BCL.shape).to(dtype)
    check_sci(cpu_extension, x_BCL, None, dy_BCL)
    partner, eta = make_pairs(4)
    found, plain = (
        evaluate_cci(x_BCL, partner, eta, None, dy_BCL, backend=backend).results
        for backend in (cpu_extension, "torch")
    )
    double = x_BCL.double(), partner, eta.double(), None, dy_BCL.double()
    exact = evaluate_cci(*double, backend="torch").results
    # d eta, one number an image, is judged over many draws in tests/test_cpu_kernels.py.
    for name in ("y", "dx"):
        assert_exact_as_torch(name, found[name], plain[name], exact[name])


def test_pooled_and_dense_agree_on_photographs(batch):
    torch.manual_seed(0)
    model = CIN(CLASSES, "resnet18", embedding_dim=8).eval()
    partner = torch.arange(8) ^ 1
    with torch.inference_mode():
        pooled = model(batch, partner)
        model.pooled = False
        dense = model(batch, partner)
    for one, other in zip(pooled, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
