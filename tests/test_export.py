"""The exported model: plain operators alone, any batch, and PyTorch's logits on real pictures."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import arguments
from torch import nn

from cin_fast.data.synthetic import SyntheticBirds
from cin_fast.export import ExportError, check_onnx, export_onnx, export_program, main
from cin_fast.models import build_model
from cin_fast.nn import CCI, SCI, ChannelAttention
from cin_fast.train import main as train
from cin_fast.trained import load_trained


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    # 64 pixels: a map of 2 x 2, so that taps differ.
    assert train(arguments(images, folder, epochs=1, method="cin", image_size=64)) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(run):
    trained = load_trained(run)
    birds = SyntheticBirds(trained.transform, train=False, size=96)
    return torch.stack([birds[index][0] for index in range(0, 250, 50)])


def test_only_plain_operators_are_left(run):
    program = export_program(load_trained(run))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "cin_fast" in name]
    assert any("softmax" in name or "exp" in name for name in called)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_torch_export_gives_the_same_logits(run, pictures, batch):
    trained = load_trained(run)
    module = export_program(trained).module()
    with torch.inference_mode():
        expected = trained.model(pictures[:batch])
    torch.testing.assert_close(module(pictures[:batch]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnxruntime_gives_the_same_logits(run, pictures, tmp_path, request):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    trained, path = load_trained(run), tmp_path / "model.onnx"
    export_onnx(trained, path)
    for batch in (1, 5):
        assert check_onnx(trained, path, pictures[:batch]) < 1e-4
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(held["classes"]) == list(trained.classes)
    assert held["image_size"] == "64"
    # From the metadata alone, the picture that the model was made for.
    how = json.loads(held["preprocessing"])
    # Of the size that it is resized to, so that it is not.
    picture = Image.effect_noise(how["resize"], 50).convert("RGB")
    left = (how["resize"][0] - how["center_crop"][0]) // 2
    cropped = picture.crop((left, left, left + 64, left + 64))
    colours = torch.from_numpy(np.array(cropped)).permute(2, 0, 1) / how["divide_by"]
    mean, std = (torch.tensor(how[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(trained.transform(picture), (colours - mean) / std)
    assert how["interpolation"] == "bilinear, antialiased"


@pytest.mark.slow
# Those with a module of their own; cin, whose parts the others are, is above.
@pytest.mark.parametrize("method", ["non-local", "cgnl", "se", "mamc"])
def test_other_methods_become_onnx(run, pictures, tmp_path, method):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, trained = build_model(method, 3, "resnet18").eval(), load_trained(run)
    for parameter in model.parameters():
        # A residual block starts as the identity: its norm's weights are 0.
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    trained = replace(trained, model=model, config=replace(trained.config, method=method))
    export_onnx(trained, tmp_path / "model.onnx")
    assert check_onnx(trained, tmp_path / "model.onnx", pictures) < 1e-4


class SomebodysNetwork(nn.Module):
    def __init__(self, backend=None):
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 8, 3), ChannelAttention(8, backend=backend)
        self.sci = SCI(8, backend=backend)
        self.cci = CCI(8, phi=self.sci.phi, backend=backend)
        nn.init.ones_(self.attention.gamma)

    def forward(self, images):
        x = self.sci(self.attention(torch.relu(self.stem(images))))
        partner = torch.tensor([1, 0])
        z, z_pair = self.cci.pooled_pair(x, partner)
        return z + z_pair + self.sci.pooled(x).z_BC + self.cci(x, partner).mean((2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_network_with_our_modules_becomes_onnx(tmp_path, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    net, images, path = SomebodysNetwork().eval(), torch.randn(2, 3, 9, 10), tmp_path / "net.onnx"
    torch.onnx.export(net, (images,), path, dynamo=dynamo, input_names=["images"])
    (found,) = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(images), rtol=1e-4, atol=1e-5)


def test_on_the_reference_an_exported_network_has_no_operator_of_ours():
    images = torch.randn(2, 3, 9, 10)
    for backend, ours in (("reference", False), (None, True)):
        net = SomebodysNetwork(backend).eval()
        program = torch.export.export(net, (images,))
        names = [str(node.target) for node in program.graph.nodes]
        assert any("cin_fast" in name for name in names) == ours
        torch.testing.assert_close(program.module()(images), net(images))


def test_what_onnx_cannot_hold_is_one_line(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    def refuse(*_, **__):
        try:
            raise AssertionError("only 4D query\nand more")
        except AssertionError as cause:
            raise torch.onnx.OnnxExporterError("Failed\n## Next steps") from cause

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ExportError) as caught:
        export_onnx(load_trained(run), tmp_path / "model.onnx")
    assert str(caught.value).startswith(
        "cin on resnet18 cannot be written as ONNX (only 4D query); --output FILE.pt2"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnxruntime_on_real_photographs(run, tmp_path, grocery_root):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    trained, path = load_trained(run), tmp_path / "model.onnx"
    export_onnx(trained, path)
    files = sorted((grocery_root / "images").glob("00*/*.jpg"))[::60][:6]
    photographs = torch.stack([trained.transform(Image.open(f).convert("RGB")) for f in files])
    assert check_onnx(trained, path, photographs) < 1e-4


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_the_command(run, tmp_path, capsys, monkeypatch):
    assert main([str(run), "--output", str(tmp_path / "new" / "model.pt2")]) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "new" / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"])["method"] == "cin"
    assert program.module()(torch.zeros(3, 3, 64, 64)).shape == (3, 3)
    whole = (tmp_path / "new" / "model.pt2").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert main([str(run), "--output", str(tmp_path / "new" / "model.pt2")]) == 2
    assert "the one before it is intact" in capsys.readouterr().err
    assert (tmp_path / "new" / "model.pt2").read_bytes() == whole
    assert main([str(run), "--output", "model.bin"]) == 2
    assert "--output: expected .onnx or .pt2, found 'model.bin'" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "--output", "model.onnx"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_packages_are_named(run, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else find(name, *a)
    )
    with pytest.raises(ImportError, match="ONNX needs onnx: pip install onnx"):
        export_onnx(load_trained(run), tmp_path / "model.onnx")
