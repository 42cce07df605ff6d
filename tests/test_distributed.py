"""Two processes on the CPU: the joined batch's loss and gradients, and one set of files."""

import json
import os

import pytest
import torch
from small_run import free_port, torchrun
from torch import distributed as dist
from torch import multiprocessing, nn

from cin_fast.distributed import World, join, on_main, pick_device
from cin_fast.models import build_model


def make_batch():
    images = torch.randn(8, 3, 32, 32, generator=torch.manual_seed(1))
    return images, torch.tensor([0, 0, 1, 2, 1, 1, 2, 0]), torch.arange(8) ^ 1


def make_model():
    torch.manual_seed(0)
    # Batch statistics are each process's own, by design: evaluation mode takes them out.
    return build_model("cin", 3, "resnet18", embedding_dim=8).eval()


def loss_and_gradients(model, module, images, labels, partner):
    loss = model.loss(module(images, partner), labels, partner, margin=50.0).total(2.0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def one_of_two(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    with join("cpu") as world:
        model = make_model()
        images, labels, _ = make_batch()
        half = slice(4 * rank, 4 * rank + 4)
        module = nn.parallel.DistributedDataParallel(model)
        loss, gradients = loss_and_gradients(
            model, module, images[half], labels[half], torch.arange(4) ^ 1
        )
        dist.all_reduce(loss)
        if world.main:
            torch.save({"loss": loss / 2, **gradients}, folder / "two.pt")


def test_two_processes_are_one_on_the_joined_batch(tmp_path):
    multiprocessing.spawn(one_of_two, (free_port(), tmp_path), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    model = make_model()
    loss, gradients = loss_and_gradients(model, model, *make_batch())
    torch.testing.assert_close(two.pop("loss"), loss)
    assert set(two) == set(gradients)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert ((two[name] - gradient).abs().max() / scale) < 1e-4, name


def one_that_may_not_write(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    with join("cpu") as world:
        try:
            on_main(world, (folder / "missing" / "file").touch)
        except Exception as error:
            (folder / f"{rank}.txt").write_text(type(error).__name__)


def test_what_stops_the_main_process_stops_all(tmp_path):
    multiprocessing.spawn(one_that_may_not_write, (free_port(), tmp_path), nprocs=2)
    assert (tmp_path / "0.txt").read_text() == "FileNotFoundError"
    assert (tmp_path / "1.txt").read_text() == "ElsewhereError"


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("auto", True, "nccl"),
        ("auto", False, "gloo"),
        ("cpu", True, "gloo"),
        ("cuda", True, "nccl"),
    ],
)
def test_gpus_talk_over_nccl(monkeypatch, device, gpus, expected):
    found = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(dist, "init_process_group", found.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with join(device):
        assert found == [expected]


@pytest.mark.slow
def test_torchrun_trains_and_only_the_first_process_writes(tmp_path):
    run = tmp_path / "run"
    result = torchrun(
        "cin_fast.train", "--dataset", "synthetic", "--image-size", "32", "--backbone", "resnet18",
        "--weights", "none", "--epochs", "1", "--workers", "0", "--embedding-dim", "8",
        "--device", "cpu", "--output", str(run),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "global batch 40 = 2 x 4 classes x 5 images, 20 pairs" in result.stdout
    assert result.stdout.count("everything of this run goes to") == 1
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    epoch = json.loads(line)
    # 18 batches of 20 on each process.
    assert epoch["images"] == 720
    assert epoch["positive_pairs"] + epoch["negative_pairs"] == 360
    # Shares of 300 test images: nobody was counted twice.
    assert (epoch["test_top1"] * 300) == pytest.approx(round(epoch["test_top1"] * 300))
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 1


def test_alone_without_torchrun(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as world:
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert not dist.is_initialized()


def test_devices():
    world = World(0, 1, 0)
    assert pick_device("cpu", world) == torch.device("cpu")
    assert pick_device("auto", world).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="--device: expected auto, cpu, cuda"):
        pick_device("abacus", world)
