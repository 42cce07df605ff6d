"""Every method's model: shapes, any batch, both forms equal, one batch learnt by heart."""

import copy

import pytest
import torch

from cin_fast.models import CIN, METHODS, build_model
from cin_fast.models.backbones import build_backbone, check_image_size, stride_of

PARTNER = torch.tensor([1, 0, 3, 2])


def make_images(batch=4, size=64, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.manual_seed(seed))


@pytest.fixture(scope="module")
def cin():
    torch.manual_seed(0)
    return CIN(7, "resnet18", embedding_dim=16).eval()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_size_gives_logits(cin, batch):
    assert cin(make_images(batch)).shape == (batch, 7)


def test_an_image_is_judged_alone_in_inference(cin):
    images = make_images(3)
    torch.testing.assert_close(cin(images)[1:2], cin(images[1:2]), rtol=1e-4, atol=1e-5)


def test_partner_adds_embeddings_and_leaves_the_logits(cin):
    images = make_images()
    logits, embeddings = cin(images, partner=PARTNER)
    assert embeddings.shape == (4, 16)
    torch.testing.assert_close(logits, cin(images), rtol=1e-4, atol=1e-5)


def test_an_embedding_depends_on_the_partner(cin):
    images = make_images()
    _, one = cin(images, partner=PARTNER)
    _, other = cin(images, partner=torch.tensor([3, 2, 1, 0]))
    assert (one - other).abs().max() > 1e-6


@pytest.mark.parametrize("size", [(448, 448), (224, 224), (32, 32), (160, 288)])
def test_pooled_and_dense_are_equal(size):
    torch.manual_seed(1)
    model = CIN(5, "resnet18", embedding_dim=8).eval()
    images = torch.randn(4, 3, *size, generator=torch.manual_seed(2))
    upstream = [torch.randn(4, n, generator=torch.manual_seed(3)) for n in (5, 8)]
    found = []
    for pooled in (True, False):
        model.pooled = pooled
        outputs = model(images, partner=PARTNER)
        gradients = torch.autograd.grad(outputs, list(model.parameters()), upstream)
        found.append([*outputs, *gradients])
    names = ["logits", "embeddings", *dict(model.named_parameters())]
    for name, pooled, dense in zip(names, *found, strict=True):
        error = ((pooled - dense).norm() / dense.norm()).item()
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("pooled", [True, False])
def test_sci_cont_is_cin_with_eta_and_gamma_zero(cin, pooled):
    cont = build_model("sci-cont", 7, "resnet18", embedding_dim=16, pooled=pooled).eval()
    state = {name: t for name, t in cin.state_dict().items() if not name.startswith("cci.")}
    cont.load_state_dict(state)
    without_eta = copy.deepcopy(cin)
    for parameter in without_eta.cci.psi.parameters():
        torch.nn.init.zeros_(parameter)
    images = make_images()
    for found, expected in zip(cont(images, PARTNER), without_eta(images, PARTNER), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_phi_is_one_convolution_for_both_interactions(cin):
    assert cin.cci.phi is cin.sci.phi


def test_h_is_in_the_state(cin):
    state = cin.state_dict()
    assert {"h.weight", "cci.psi.weight", "sci.phi.bias", "classifier.weight"} <= set(state)


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_is_learnt_by_heart(method):
    torch.manual_seed(0)
    model = build_model(method, 3, "resnet18", embedding_dim=8).train()
    images, labels = make_images(8, 64), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    partner = torch.arange(8) ^ 1 if model.uses_pairs else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    losses, learnt = [], False
    while not learnt and len(losses) < 60:
        output = model(images, partner)
        parts = model.loss(output, labels, partner, margin=0.5)
        optimizer.zero_grad()
        parts.total(2.0).backward()
        optimizer.step()
        losses.append(parts.classification.item())
        logits = output[0] if isinstance(output, tuple) else output
        # MAMC's other term compares vectors of length 1 and cannot come near 0.
        learnt = losses[-1] < 0.1 * losses[0] and bool((logits.argmax(1) == labels).all())
    assert learnt, losses


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_a_gradient(method):
    torch.manual_seed(0)
    model = build_model(method, 4, "resnet18", embedding_dim=8)
    # The layers before a norm that starts at 0 learn from the second step on.
    if hasattr(model, "block"):
        torch.nn.init.ones_(model.block.norm.weight)
    labels = torch.tensor([0, 0, 1, 2])
    partner = PARTNER if model.uses_pairs else None
    # A margin beyond any distance keeps negative pairs alive.
    model.loss(model(make_images(), partner), labels, partner, margin=1e3).total(2.0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A distance does not change when both ends move: the bias of h learns nothing.
        assert parameter.grad.abs().max() > 0 or name == "h.bias", name


def test_pos_sci_turns_the_sign():
    assert build_model("pos-sci", 2, "resnet18").sci.scale == 1.0
    assert build_model("sci", 2, "resnet18").sci.scale == -1.0


@pytest.mark.parametrize(
    ("name", "channels", "stride"),
    [("resnet18", 512, 32), ("resnet34", 512, 32), ("resnet50", 2048, 32), ("vgg19", 512, 16)],
)
def test_backbones(name, channels, stride):
    backbone = build_backbone(name).eval()
    assert (backbone.channels, backbone.stride, stride_of(name)) == (channels, stride, stride)
    with torch.inference_mode():
        assert backbone(make_images(1, 64)).shape == (1, channels, 64 // stride, 64 // stride)


def test_vgg19_has_784_positions_at_448_pixels():
    assert (448 // build_backbone("vgg19").stride) ** 2 == 784


def test_any_timm_name_where_timm_is_installed():
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = build_backbone("mobilenetv3_small_050").eval()
    with torch.inference_mode():
        side = 64 // backbone.stride
        assert backbone(make_images(1, 64)).shape == (1, backbone.channels, side, side)


def test_a_timm_transformer_with_its_channels_last():
    pytest.importorskip("timm", reason="timm is not installed")
    model = CIN(3, "swin_tiny_patch4_window7_224", embedding_dim=8).eval()
    with torch.inference_mode():
        assert model.backbone(make_images(1, 224)).shape == (1, 768, 7, 7)
        assert model(make_images(2, 224)).shape == (2, 3)


def test_a_size_that_a_backbone_does_not_take_is_refused():
    check_image_size("resnet18", 32)
    with pytest.raises(
        ValueError, match=r"--image-size: 31 is smaller than the stride of resnet18"
    ):
        check_image_size("resnet18", 31)
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match=r"--image-size: vit_.* does not take 48 pixels \(.*224"):
        check_image_size("vit_tiny_patch16_224", 48)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backbone: 'resnet19' is none of resnet18"):
        build_backbone("resnet19")
    with pytest.raises(ValueError, match=r"method: expected one of .*cin.*, found 'nts'"):
        build_model("nts", 2, "resnet18")
    with pytest.raises(ValueError, match="num_classes: expected at least 1, found 0"):
        CIN(0, "resnet18")


def test_embeddings_have_a_dimension():
    with pytest.raises(ValueError, match="embedding_dim: expected at least 1, found 0"):
        CIN(3, "resnet18", embedding_dim=0)


def test_a_local_weight_file_is_taken(tmp_path):
    path = tmp_path / "weights.pt"
    donor = build_backbone("resnet18")
    torch.save(donor.body.state_dict(), path)
    taken = CIN(3, "resnet18", pretrained=str(path)).backbone
    for name, tensor in donor.body.state_dict().items():
        assert torch.equal(taken.body.state_dict()[name], tensor)


def test_a_whole_torchvision_network_is_a_weight_file(tmp_path):
    import torchvision

    net = torchvision.models.resnet18(weights=None)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pt")
    backbone = build_backbone("resnet18", tmp_path / "net.pt")
    assert torch.equal(backbone.body.conv1.weight, net.conv1.weight)


@pytest.mark.parametrize("prefix", ["module.backbone.body.", "_orig_mod.", "module.model."])
def test_what_wrappers_put_before_the_names_is_taken_off(tmp_path, prefix):
    donor = build_backbone("resnet18").body.state_dict()
    torch.save({prefix + name: t for name, t in donor.items()}, tmp_path / "net.pt")
    taken = build_backbone("resnet18", tmp_path / "net.pt").body.state_dict()
    assert all(torch.equal(taken[name], t) for name, t in donor.items())


@pytest.mark.parametrize("name", ["regnetx_002", "convnext_atto"])
def test_a_whole_timm_network_is_a_weight_file(tmp_path, name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    # Of another number of classes than the library's.
    net = timm.create_model(name, num_classes=7).state_dict()
    net = {key: t + torch.rand_like(t) if t.is_floating_point() else t for key, t in net.items()}
    held = {tuple(t.flatten()[:50].tolist()) for t in net.values()}
    for prefix in ("", "module.", "model.", "module.backbone.body."):
        content = {prefix + key: t for key, t in net.items()}
        average = {key: torch.zeros_like(t) for key, t in net.items()}
        torch.save({"state_dict": content, "state_dict_ema": average}, tmp_path / "net.pt")
        taken = build_backbone(name, tmp_path / "net.pt").body.state_dict()
        assert all(tuple(t.flatten()[:50].tolist()) in held for t in taken.values())
    body = build_backbone(name).body.state_dict()
    torch.save(body, tmp_path / "body.pt")
    taken = build_backbone(name, tmp_path / "body.pt").body.state_dict()
    assert all(torch.equal(taken[name], t) for name, t in body.items())
    torch.save({"stem.weight": torch.zeros(1)}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="does not fit: it lacks"):
        build_backbone(name, tmp_path / "none.pt")


def test_weights_that_do_not_fit_say_so(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(FileNotFoundError, match=r"weights: no file .*weights\.pt"):
        build_backbone("resnet18", path)
    whole = {"state_dict": {}, "net": torch.nn.ReLU}
    torch.save(whole, path)
    for content in (b"not a weight file", path.read_bytes(), path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or no weight file; expected .* wrote$"):
            build_backbone("resnet18", path)
    torch.save(build_backbone("resnet18").body.state_dict(), path)
    with pytest.raises(ValueError, match=r"does not fit: it .* layer"):
        build_backbone("resnet50", path)


def test_imagenet_weights_that_cannot_be_had_name_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path}.*resnet18-f37072fd\.pth.*--weights none"
    ):
        build_backbone("resnet18", True)


@pytest.mark.parametrize("method", ["cin", "sci-cont"])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("partner", [[1, 2, 3, 0], [9, 0, 3, 2], [1, 0]])
def test_a_partner_that_pairs_nobody_is_refused(method, pooled, partner):
    model = build_model(method, 3, "resnet18", pooled=pooled, embedding_dim=8).eval()
    with pytest.raises(ValueError, match="partner: expected"):
        model(make_images(4, 32), torch.tensor(partner))
