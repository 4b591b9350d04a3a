"""The reconstruction loss and its critic: by hand, by gradients, and on a toy."""

import math

import pytest
import torch
from torch import nn

from semhitok.config import CriticConfig, ReconstructionConfig
from semhitok.models.lpips import perceptual_loss
from semhitok.models.squeezenet import SqueezeNetDistance
from semhitok.training import critic as critics
from semhitok.training.critic import (
    DinoCritic,
    LeCam,
    PatchCritic,
    build_critic,
    critic_loss,
    diff_augment,
    verdict_loss,
    window,
)
from semhitok.training.reconstruction import ReconstructionLoss


class Fixed:
    """Random numbers that follow from the purpose alone, for images `rows` of a global batch."""

    def __init__(self, rows=range(4), seed=0):
        self.rows, self.seed = rows, seed

    def _draw(self, purpose, *shape):
        generator = torch.Generator().manual_seed(self.seed + sum(map(ord, purpose)))
        return torch.rand(*shape, generator=generator)

    def uniform(self, purpose, *shape):
        return self._draw(purpose, 16, *shape)[list(self.rows)]

    def uniform_shared(self, purpose, n):
        return self._draw(purpose, n)


def pictures(count=4, size=32, seed=0, **options):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), **options)


def never(gradient):
    raise AssertionError("last_layer is for an adaptive critic")


def small_loss(critic=None, patch_size=4, **weights):
    torch.manual_seed(0)
    settings = {"weight": 0.5, "width": 8, "layers": 2, "train_from": 0, "start": 0, "ramp": 0} | (critic or {})
    return ReconstructionLoss(
        ReconstructionConfig(**{"lpips": 0.0} | weights, critic=CriticConfig(**settings)), patch_size
    )


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


TINY = {"kind": "dino", "backbone": "vit_tiny_patch16_224", "image_size": 32, "blocks": [0, -1]}


@pytest.fixture
def dino():
    torch.manual_seed(0)
    return DinoCritic(CriticConfig(**TINY), load=False)


# ---- losses ----


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("kind", "critic", "verdict"),
    [
        # real 2, 0.5, -1; fake 0.5, -3
        ("hinge", ((0 + 0.5 + 2) / 3 + (1.5 + 0) / 2) / 2, -(0.5 - 3) / 2),
        (
            "non_saturating",
            ((softplus(-2) + softplus(-0.5) + softplus(1)) / 3 + (softplus(0.5) + softplus(-3)) / 2) / 2,
            (softplus(-0.5) + softplus(3)) / 2,
        ),
    ],
)
def test_losses_by_hand(kind, critic, verdict):
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[0.5], [-3.0]])
    assert critic_loss(kind, real, fake).item() == pytest.approx(critic)
    assert verdict_loss(kind, fake).item() == pytest.approx(verdict)


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_real_and_fake_are_not_swapped(kind):
    high, low = torch.full((3,), 5.0), torch.full((3,), -5.0)
    assert critic_loss(kind, high, low) < 0.01 < 4 < critic_loss(kind, low, high)
    assert verdict_loss(kind, high) < verdict_loss(kind, low)


def test_lecam_by_hand():
    lecam = LeCam()
    lecam.update(torch.tensor(2.0), -1.0)
    lecam.update(3.0, torch.tensor(-4.0))
    assert lecam.real.item() == pytest.approx(0.99 * 0.02 + 0.03)
    assert lecam.fake.item() == pytest.approx(-0.99 * 0.01 - 0.04)
    real, fake = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    by_hand = (1 - lecam.fake) ** 2 / 2 + (lecam.real + 1) ** 2 / 2
    assert lecam.regularizer(real, fake).item() == pytest.approx(by_hand.item())
    assert set(lecam.state_dict()) == {"real", "fake"}


# ---- what the critic is shown ----


def test_numbers_of_one_half_change_nothing():
    images = pictures(3, 33, dtype=torch.float64)
    torch.testing.assert_close(diff_augment(images, torch.full((3, 8), 0.5)), images)


def test_colours_by_hand():
    images, numbers = pictures(1), torch.full((1, 8), 0.5)
    grey, mean = images.mean(1, keepdim=True), images.mean()
    for place, number, expected in (
        (0, 0.0, images - 0.25),
        (0, 0.75, images + 0.125),
        (1, 0.0, grey.expand_as(images)),
        (1, 0.75, grey + 1.5 * (images - grey)),
        (2, 0.0, mean + 0.5 * (images - mean)),
        (2, 0.75, mean + 1.25 * (images - mean)),
    ):
        changed = numbers.clone()
        changed[0, place] = number
        torch.testing.assert_close(diff_augment(images, changed), expected)


def test_images_move_by_up_to_an_eighth():
    images, numbers = pictures(1, 16), torch.full((1, 8), 0.5)
    numbers[0, 3], numbers[0, 4] = 0.999, 0.0  # 2 down, 2 left
    expected = torch.full_like(images, 0.5)
    expected[:, :, 2:, :-2] = images[:, :, :-2, 2:]
    torch.testing.assert_close(diff_augment(images, numbers), expected)


def test_half_of_each_side_is_cut_out():
    images, numbers = pictures(1, 16), torch.full((1, 8), 0.5)
    numbers[0, 7] = 0.49
    expected = images.clone()
    expected[:, :, 4:12, 4:12] = 0.5
    torch.testing.assert_close(diff_augment(images, numbers), expected)
    numbers[0, 5], numbers[0, 6] = 0.0, 0.999  # centred on the upper right corner
    expected = images.clone()
    expected[:, :, :4, 12:] = 0.5
    torch.testing.assert_close(diff_augment(images, numbers), expected)


def test_augmented_images_depend_on_their_own_numbers_only():
    images, numbers = pictures(6), torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    whole = diff_augment(images, numbers)
    parts = torch.cat([diff_augment(images[s], numbers[s]) for s in (slice(0, 1), slice(1, 4), slice(4, 6))])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)
    assert whole.dtype == images.dtype


def test_augmentation_is_differentiable():
    images = pictures(2, 6, dtype=torch.float64).requires_grad_()
    numbers = torch.rand(2, 8, generator=torch.Generator().manual_seed(2))
    numbers[0, 7], numbers[1, 7] = 0.1, 0.9
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, numbers), images)


def test_the_window_is_the_same_for_a_batch():
    images = pictures(2, 12)
    for numbers, (top, left) in (((0.0, 0.99999), (0, 4)), ((0.5, 0.2), (2, 1))):
        seen = window(images, torch.tensor(numbers), 4)
        assert torch.equal(seen, images[:, :, top : top + 8, left : left + 8])
    assert torch.equal(window(images, torch.tensor([0.3, 0.9]), 0), images)
    highest = torch.full((2,), 1 - 2**-24)  # that torch.rand gives
    assert torch.equal(window(images, highest, 4), images[:, :, 4:, 4:])
    for shift in (-1, 12):
        with pytest.raises(ValueError, match=r"critic\.shift"):
            window(images, torch.tensor([0.5, 0.5]), shift)


# ---- critics ----


def test_patch_critic_judges_patches_alone():
    torch.manual_seed(0)
    critic = PatchCritic(4, 2).eval()
    images = pictures(3)
    logits = critic(images)
    assert logits.shape == (3, 1, 6, 6) and logits.dtype == torch.float32
    torch.testing.assert_close(critic(images[1:2]), logits[1:2])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in critic.modules())
    assert critic.smallest == 12
    assert critic(pictures(1, 12)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 12 pixels"):
        critic(pictures(1, 11))


def test_spectral_norms_are_about_one():
    torch.manual_seed(0)
    critic = PatchCritic(4, 2)
    for _ in range(30):
        critic(pictures(1))
    for layer in critic.network:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_power_iterations_do_not_see_the_images():
    torch.manual_seed(0)
    first, second = PatchCritic(4, 2), PatchCritic(4, 2)
    second.load_state_dict(first.state_dict())
    before = state(first)
    for seed in range(3):
        first(pictures(1, seed=seed))
        second(100 * pictures(5, 48, seed=seed + 7))
    assert same(state(first), state(second)) and not same(state(first), before)


def test_dino_critic_trains_its_heads_only(dino):
    assert dino.training and dino.heads.training
    for mode in (True, False):
        dino.train(mode)
        assert dino.heads.training == mode and not any(m.training for m in dino.vit.modules())
    trained = {name for name, p in dino.named_parameters() if p.requires_grad}
    assert trained == {f"heads.{name}" for name, _ in dino.heads.named_parameters()} and trained
    images = pictures(2, 40).requires_grad_()
    logits = dino(images)
    assert logits.shape == (2, 2 * 2 * 2) and logits.dtype == torch.float32
    logits.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in dino.vit.parameters())
    assert all(p.grad is not None for p in dino.heads.parameters())
    with torch.no_grad():
        dino.eval()
        torch.testing.assert_close(dino(images[1:]), dino(images)[1:])


def test_dino_critic_sees_normalised_tokens_of_its_blocks(dino):
    images, seen = pictures(2), []
    for head in dino.heads:
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dino(images)
    tokens = dino.vit._pos_embed(dino.vit.patch_embed((images - dino.mean) / dino.std))
    outputs = [tokens := block(tokens) for block in dino.vit.blocks]
    for found, expected in zip(seen, (outputs[0], outputs[-1]), strict=True):
        torch.testing.assert_close(found.flatten(2).mT, expected[:, 1:])


def test_heads_normalise_tokens_one_by_one():
    torch.manual_seed(0)
    head, maps = critics.Head(8).eval(), torch.randn(2, 8, 3, 3)
    scaled = maps * torch.rand(2, 1, 3, 3).add(0.5) + torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(head(scaled), head(maps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 64), (20, 32), (32, 32)])
def test_resizing_is_bicubic(shape):
    images = torch.rand(2, 3, *shape)
    expected = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(critics.resize(images, 32), expected)


def test_dino_critic_reads_a_local_file_or_says_what_is_wrong(dino, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(dino.vit.state_dict(), path)
    loaded = build_critic(CriticConfig(**TINY, checkpoint=str(path)))
    assert isinstance(loaded, DinoCritic) and same(state(loaded.vit), state(dino.vit))
    with pytest.raises(OSError, match="critic: no weights for 'vit_tiny_patch16_224'"):
        build_critic(CriticConfig(**TINY, checkpoint=str(tmp_path / "none.pth")))
    for change, message in (
        ({"backbone": "no_such_vit"}, "critic: timm cannot build 'no_such_vit'"),
        ({"blocks": [0, 12]}, r"critic\.blocks: expected some of -12\.\.11"),
        ({"blocks": []}, r"critic\.blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            build_critic(CriticConfig(**TINY | change), load=False)


# ---- the reconstruction loss ----


def test_terms_of_weight_zero_are_left_out():
    loss = small_loss({"weight": 0.0}, l1=2.0, l2=3.0)
    assert loss.critic is None and loss.perceptual is None and loss.lecam is None
    predicted, images = pictures(seed=1), pictures()
    value, figures = loss(predicted, images, Fixed(), 10**6, never)
    by_hand = 2 * (predicted - images).abs().mean() + 3 * (predicted - images).square().mean()
    torch.testing.assert_close(value, by_hand)
    assert set(figures) == {"l1", "l2"}


def test_the_verdict_starts_and_ramps_up():
    loss = small_loss({"start": 100, "ramp": 4, "weight": 0.8})
    predicted, images = pictures(seed=1), pictures()
    before, figures = loss(predicted, images, Fixed(), 99, never)
    assert set(figures) == {"l1", "l2"}
    for step, weight in ((100, 0.2), (101, 0.4), (103, 0.8), (104, 0.8), (10**6, 0.8)):
        value, figures = loss(predicted, images, Fixed(), step, never)
        assert figures["critic_weight"] == pytest.approx(weight)
        torch.testing.assert_close(value, before + weight * figures["verdict"])
    assert small_loss({"start": 7, "ramp": 0})(predicted, images, Fixed(), 7, never)[1]["critic_weight"] == 0.5


@pytest.mark.parametrize("augment", [False, True])
def test_the_verdict_reaches_the_prediction_and_leaves_the_critic_alone(augment):
    loss = small_loss({"augment": augment}, l1=0.0, l2=0.0)
    before = state(loss.critic)
    predicted = pictures(seed=1).requires_grad_()
    value, figures = loss(predicted, pictures(), Fixed(), 0, never)
    value.backward()
    assert predicted.grad.abs().sum() > 0
    assert not any(torch.is_tensor(f) and f.requires_grad for f in figures.values())
    assert same(state(loss.critic), before)
    assert loss.critic.training and all(m.training for m in loss.critic.modules())
    assert all(p.requires_grad and p.grad is None for p in loss.critic.parameters())


def test_following_the_verdict_raises_the_logits():
    loss = small_loss({"shift": 0}, l1=0.0, l2=0.0)
    predicted = pictures(seed=1).requires_grad_()
    first, _ = loss(predicted, pictures(), Fixed(), 0, never)
    (gradient,) = torch.autograd.grad(first, predicted)
    loss.critic.eval()
    assert loss.critic((predicted - 10 * gradient).detach()).mean() > loss.critic(predicted).mean()


def test_the_verdict_judges_what_the_critic_is_trained_on():
    loss = small_loss({"augment": True})
    predicted, images = pictures(seed=1), pictures()
    seen = loss.critic_inputs(predicted.requires_grad_(), images, Fixed())
    assert seen.shape == (8, 3, 28, 28) and seen.dtype == torch.float32 and not seen.requires_grad
    loss.critic.eval()
    _, figures = loss(predicted, images, Fixed(), 0, never)
    torch.testing.assert_close(figures["verdict"], verdict_loss("hinge", loss.critic(seen[4:])).detach())
    # the same image on both sides is augmented in two ways, but through one window
    both = loss.critic_inputs(images, images, Fixed())
    assert not torch.equal(both[:4], both[4:])
    plain = small_loss({"shift": 6}).critic_inputs(images, images, Fixed())
    assert plain.shape == (8, 3, 26, 26) and torch.equal(plain[:4], plain[4:])


def test_a_split_batch_is_seen_alike():
    loss = small_loss({"augment": True})
    predicted, images = pictures(seed=1), pictures()
    whole = loss.critic_inputs(predicted, images, Fixed())
    for rows in ([0], [1, 2, 3]):
        part = loss.critic_inputs(predicted[rows], images[rows], Fixed(rows))
        expected = torch.cat([whole[rows], whole[[4 + row for row in rows]]])
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)


def test_the_adaptive_weight_by_hand(monkeypatch):
    """predicted = w * features; the other terms' gradient of w is that of 2 * l2, the verdict's that of -3 * mean."""

    class Linear(nn.Module):
        def forward(self, images):
            return 3 * images.mean((1, 2, 3))

    monkeypatch.setattr("semhitok.training.reconstruction.build_critic", lambda config: Linear())
    features, images = pictures(2, 8, seed=1), pictures(2, 8)
    w = torch.tensor(0.7, requires_grad=True)

    def run(adaptive_range):
        loss = small_loss({"adaptive": True, "adaptive_range": adaptive_range, "shift": 0, "ramp": 4}, l1=0.0, l2=2.0)
        predicted = w * features
        value, figures = loss(
            predicted, images, Fixed(range(2)), 1, lambda g: torch.autograd.grad(predicted, w, g, retain_graph=True)[0]
        )
        (gradient,) = torch.autograd.grad(value, w)
        return figures["critic_weight"], gradient

    others = (4 * (w * features - images) * features).mean().detach()
    verdict = -3 * features.mean()
    ratio = others.abs() / (verdict.abs() + 1e-6)
    weight, gradient = run((0.0, 1e4))
    torch.testing.assert_close(weight, 0.5 * 0.5 * ratio)
    torch.testing.assert_close(gradient, others + weight * verdict)
    assert run((2.0, 3.0))[0].item() == pytest.approx(0.25 * 2)
    assert run((0.0, 1e-3))[0].item() == pytest.approx(0.25 * 1e-3)


def test_lecam_joins_the_critics_loss_after_its_first_step():
    loss = small_loss({"lecam": 0.1, "train_from": 5, "loss": "non_saturating"})
    real, fake = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 0.5]])
    logits = torch.cat([real, fake]).requires_grad_()
    plain, figures, means = loss.critic_objective(logits, 5)
    torch.testing.assert_close(plain, critic_loss("non_saturating", real, fake))
    assert set(figures) == {"real_logit", "fake_logit"} and means.tolist() == [1.5, -0.25]
    assert (figures["real_logit"].item(), figures["fake_logit"].item()) == (1.5, -0.25)
    assert not any(figure.requires_grad for figure in figures.values())
    loss.update([means])
    assert loss.lecam.real.item() == pytest.approx(0.01 * 1.5) and loss.lecam.fake.item() == pytest.approx(0.01 * -0.25)
    value, _, _ = loss.critic_objective(logits, 6)
    torch.testing.assert_close(value, plain + 0.1 * loss.lecam.regularizer(real, fake))
    value.backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["patch", "dino"])
def test_losses_stay_fp32_under_autocast(kind, dino, monkeypatch):
    if kind == "dino":
        monkeypatch.setattr("semhitok.training.reconstruction.build_critic", lambda config: dino)
    loss = small_loss({"augment": True, "lecam": 0.1, "train_from": 0})
    predicted, images = pictures(seed=1).bfloat16().requires_grad_(), pictures()
    expected = loss(predicted, images, Fixed(), 0, never)[0]
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = loss(predicted, images, Fixed(), 0, never)
        inputs = loss.critic_inputs(predicted, images, Fixed())
        logits = loss.critic(inputs)
        critic_value, _, _ = loss.critic_objective(logits, 1)
    assert {t.dtype for t in (value, inputs, logits, critic_value)} == {torch.float32}
    assert torch.equal(value, expected)
    value.backward()
    assert predicted.grad.dtype == torch.bfloat16


def test_a_critic_learns_to_tell_blurred_images():
    loss = small_loss({"width": 16})
    optimizer = torch.optim.Adam(loss.critic.parameters(), 2e-3, betas=(0.5, 0.9))
    values = []
    for step in range(60):
        images = pictures(8, seed=step)
        blurred = torch.nn.functional.avg_pool2d(images, 3, 1, padding=1, count_include_pad=False)
        logits = loss.critic(loss.critic_inputs(blurred, images, Fixed(range(8), step)))
        value, figures, _ = loss.critic_objective(logits, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-5:]) / 5 < 0.3 < 0.9 < values[0]
    assert figures["real_logit"] > figures["fake_logit"]


# ---- LPIPS ----


@pytest.fixture(scope="module")
def lpips_network():
    """The real network with random convolutions, and a state dict of torchvision's form that has them."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    features = {
        f"features.{place}.{kind}": tensor.clone()
        for name, tensor in network.net.state_dict().items()
        for _, place, kind in [name.split(".")]
    }
    assert len(features) == 26
    return network, features


@pytest.fixture
def published(lpips_network, monkeypatch):
    """What the weights' source gives; a test may change it."""
    network, features = lpips_network
    features = dict(features, **{"classifier.0.bias": torch.zeros(3)})

    def get_state_dict(self, *, progress, check_hash):
        assert check_hash and not progress
        return features

    monkeypatch.setattr("lpips.LPIPS", lambda **options: network)
    monkeypatch.setattr("torchvision.models.VGG16_Weights.get_state_dict", get_state_dict)
    return network, features


def test_published_lpips_weights_pass(published):
    network = perceptual_loss()
    assert network is published[0] and not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", ["features.0.weight", "features.28.bias"])
def test_other_convolutions_are_told(published, name):
    published[1][name] = published[1][name] + 1e-6
    with pytest.raises(RuntimeError, match=f"lpips: {name} is not as published"):
        perceptual_loss()


def test_other_heads_are_told(published, monkeypatch):
    head = published[0].lin3.model[1]
    monkeypatch.setitem(head._parameters, "weight", nn.Parameter(head.weight.detach() + 1e-6))
    with pytest.raises(RuntimeError, match=r"lpips: lin3\.model\.1\.weight"):
        perceptual_loss()


def test_no_weights_no_lpips(published, monkeypatch):
    def offline(self, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.models.VGG16_Weights.get_state_dict", offline)
    with pytest.raises(OSError, match="LPIPS weights are not available: no network"):
        perceptual_loss()


def test_lpips_joins_the_loss_and_stays_in_eval_mode(lpips_network, monkeypatch):
    network = lpips_network[0].eval().requires_grad_(False)
    monkeypatch.setattr("semhitok.training.reconstruction.perceptual_loss", lambda: network)
    loss = small_loss({"weight": 0.0}, lpips=0.5).train()
    assert loss.training and not any(m.training for m in loss.perceptual.modules())
    predicted, images = pictures(2, seed=1).requires_grad_(), pictures(2)
    value, figures = loss(predicted, images, Fixed(), 0, never)
    torch.testing.assert_close(value.detach(), figures["l1"] + figures["l2"] + 0.5 * figures["lpips"])
    torch.testing.assert_close(figures["lpips"], network(predicted * 2 - 1, images * 2 - 1).mean().detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(predicted, images, Fixed(), 0, never)[0], value)
    value.backward()
    assert figures["lpips"] > 0 and predicted.grad.abs().sum() > 0


# ---- the SqueezeNet distance ----


def test_the_squeezenet_distance_joins_the_loss():
    loss = small_loss({"weight": 0.0}, squeezenet=0.5).train()
    predicted, images = pictures(2, seed=1).requires_grad_(), pictures(2)
    value, figures = loss(predicted, images, Fixed(), 0, never)
    torch.testing.assert_close(value.detach(), figures["l1"] + figures["l2"] + 0.5 * figures["squeezenet"])
    torch.testing.assert_close(figures["squeezenet"], SqueezeNetDistance()(predicted, images).mean().detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(predicted, images, Fixed(), 0, never)[0], value)
    value.backward()
    assert figures["squeezenet"] > 0 and predicted.grad.abs().sum() > 0
    assert not list(loss.parameters()) and not loss.counters()
    assert small_loss({"weight": 0.0}, squeezenet=0.0).squeezenet is None
    assert small_loss({"weight": 0.0}).squeezenet is None
