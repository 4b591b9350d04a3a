"""The designs that are compared: equal networks and one training loop, with different codebooks and stages.

| kind        | id of a patch                                          | trained                              |
|-------------|--------------------------------------------------------|--------------------------------------|
| semantic    | i of K                                                 | semantic branch, then decoder        |
| flat        | one of K * m pixel codes                               | pixel branch                         |
| independent | i of K, and j of m pixel codes for all patches         | semantic branch, then pixel branch   |
| shared      | one of K * m pairs of code vectors (TokenFlow's rule)  | both at once                         |
| joint       | i of K, and j of the m sub-codes of i                  | both at once                         |
| staged      | the same: SemHiTok                                     | semantic branch, then pixel branch   |
| ragged      | the same, m_i by marginal distortion, K * m in all     | semantic branch, then pixel branch   |

A branch gets the same number of updates, on the same batches, in every arm that has it.
"""

from __future__ import annotations

import copy
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semhitok import ops
from semhitok._messages import progress
from semhitok.config import ViTConfig
from semhitok.models.pixel import PixelDecoder, PixelEncoder
from semhitok.models.semantic import SemanticDecoder, SemanticHead
from semhitok.models.teacher import Teacher
from semhitok.quantizer import HierarchicalQuantizer, SemanticQuantizer, straight_through
from semhitok.training.stage import bf16_is_slow

PATCH, GRID = 8, 8
BATCH = 250  # images at a time where nothing is trained
RESTART = 100  # a code is restarted once it has missed this many times its share of the tokens
DECAY = 0.97


def bf16() -> torch.autocast:
    """Autocast to bf16 on CPUs that compute in it; others would take many times as long."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not bf16_is_slow(torch.device("cpu")))


class Sizes(NamedTuple):
    """Of the networks and codes of all arms: dimension of semantic and of pixel codes, channels and blocks."""

    dim: int = 16
    width: int = 96  # a multiple of 32, the width of an attention head
    depth: int = 2
    semantic_depth: int = 1  # blocks of the semantic decoder
    commitment: int = 16  # weight of the semantic codes' commitment, the mean over elements

    def network(self, depth: int) -> ViTConfig:
        return ViTConfig(self.width, depth, self.width // 32)


SIZES = Sizes()


class Arm(NamedTuple):
    """A row of the table: K and m codes; the semantic branch reads `feed`, the frozen teacher's features or images."""

    kind: str
    K: int
    m: int
    feed: str = "teacher"

    @property
    def title(self) -> str:
        names = {
            "semantic": "semantic only", "flat": "flat pixel codebook", "independent": "two independent",
            "shared": "shared index, pairs", "joint": "hierarchical, joint", "staged": "hierarchical, staged",
            "ragged": "hierarchical, staged, ragged m",
        }  # fmt: skip
        sizes = {"semantic": f"{self.K}", "flat": f"{self.K * self.m}", "shared": f"{self.K * self.m}"}
        size = sizes.get(self.kind, f"{self.K} x {self.m}")
        return f"{names[self.kind]}, {size}" + (", image-fed" if self.feed == "image" else "")


class Codes(nn.Module):
    """The codebooks of an arm, made of the library's quantizers.

    `semantic` holds the semantic codes (None: flat). `pixel` holds the pixel codes (None: semantic) in groups: one for
    each semantic code (joint, staged, ragged), or a single one for all patches.
    """

    def __init__(self, arm: Arm, dim: int = SIZES.dim) -> None:
        super().__init__()
        self.arm, self.vocabulary, self.dim = arm, arm.K * arm.m, dim
        shared = {"flat": (1, self.vocabulary), "shared": (1, self.vocabulary), "independent": (1, arm.m)}
        self.pixel = self.semantic = None
        if arm.kind != "semantic":
            groups, each = shared.get(arm.kind, (arm.K, arm.m))
            self.pixel = HierarchicalQuantizer(groups, each, dim, dim, decay=DECAY, adaptive=arm.kind == "ragged")
        if arm.kind != "flat":
            self.semantic = SemanticQuantizer(self.vocabulary if arm.kind == "shared" else arm.K, dim, decay=DECAY)
        self.scale = (1.0, 1.0)  # of the two halves of a pair (shared)

    def search(self, z_sem: Tensor, z_pix: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [..., dim] -> ids [...] of their semantic and of their pixel code vectors.

        The pixel ids are 0 without z_pix, and if the arm has no pixel codes.
        """
        if self.arm.kind == "shared" and z_pix is not None:
            found = nearest_pair(z_sem, z_pix, self.semantic.codebook, self.pixel.pix_codebook[0], self.scale)
            return found, found
        i = torch.zeros(z_sem.shape[:-1], dtype=torch.int64)
        if self.semantic is not None:
            _, i = ops.nearest_code(z_sem, self.semantic.codebook, "ip")
        if self.pixel is None or z_pix is None:
            return i, torch.zeros_like(i)
        if self.pixel.num_codes == 1:
            return i, ops.nearest_code(z_pix, self.pixel.pix_codebook[0], "l2")[1]
        _, j = ops.nearest_subcode(z_pix, self.pixel.pix_codebook, i, "l2", self.pixel.offsets)
        return i, self.pixel.join(i, j)

    def group(self, i: Tensor) -> Tensor:
        """The groups of pixel codes that belong to semantic ids."""
        return i if self.pixel.num_codes > 1 else torch.zeros_like(i)

    def ids(self, i: Tensor, p: Tensor) -> Tensor:
        """The flat ids of patches from what `search` returned."""
        return {"semantic": i, "independent": i * self.arm.m + p}.get(self.arm.kind, p)

    def vectors(self, i: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """q_sem and q_pix of what `search` returned; zeros for codes that the arm does not have."""
        zeros = torch.zeros(*i.shape, self.dim)
        q_sem = zeros if self.semantic is None else self.semantic.codebook[i]
        return q_sem, zeros if self.pixel is None else self.pixel.pix_codebook.flatten(0, -2)[p]

    def without_pixels(self, i: Tensor, p: Tensor) -> Tensor | None:
        """What replaces q_pix when only the semantic id is known; None if the id has no semantic part."""
        if self.arm.kind in ("flat", "shared"):
            return None
        if self.pixel is None:
            return torch.zeros(*i.shape, self.dim)
        return self.pixel.group_means(p)

    def initialize_semantic(self, z_sem: Tensor, generator: Generator) -> None:
        if self.arm.kind != "shared":
            self.semantic.initialize(z_sem, generator=generator)

    @torch.no_grad()
    def initialize_pixel(self, z_sem: Tensor, z_pix: Tensor, generator: Generator) -> None:
        """k-means on tokens [N, dim]; for pairs, on both halves at once."""
        if self.arm.kind == "shared":
            self.scale = tuple((0.5 / z.var(0).sum()).sqrt().item() for z in (z_sem, z_pix))
            both = HierarchicalQuantizer(1, self.vocabulary, 1, 2 * self.dim)
            group = torch.zeros(len(z_pix), dtype=torch.int64)
            tokens = torch.cat([z_sem * self.scale[0], z_pix * self.scale[1]], -1)
            both.initialize(tokens, group, generator=generator)
            centres = both.pix_codebook[0]
            self.semantic.codebook.copy_(F.normalize(centres[:, : self.dim], dim=-1))
            self.pixel.pix_codebook.copy_(centres[None, :, self.dim :] / self.scale[1])
            return
        i, _ = self.search(z_sem, None)
        if self.pixel is not None:
            self.pixel.initialize(z_pix, self.group(i), generator=generator)

    @torch.no_grad()
    def update(
        self, z_sem: Tensor, z_pix: Tensor | None, i: Tensor, p: Tensor, parts: set[str], draw: Generator
    ) -> None:
        """Moving averages and restarts of the codebooks of `parts`, after a step's tokens."""
        shared = self.arm.kind == "shared"
        if "semantic" in parts and self.semantic is not None:
            self.semantic.update(z_sem, i)
            if not shared:
                self.semantic.restart(z_sem, RESTART, generator=draw)
        if "pixel" in parts and self.pixel is not None:
            self.pixel.update(z_pix, p)
            if not shared:
                window = RESTART if self.pixel.num_codes > 1 else RESTART * self.pixel.num_sub_codes
                self.pixel.restart(z_pix, p, window, generator=draw)
        if shared:  # both halves of a pair move to the same token
            dead = (self.semantic.misses >= RESTART * self.vocabulary).nonzero().squeeze(1)
            pick = torch.randint(i.numel(), (len(dead),), generator=draw)
            self.semantic.codebook[dead] = z_sem.reshape(-1, self.dim)[pick]
            self.pixel.pix_codebook[0, dead] = z_pix.reshape(-1, self.dim)[pick]
            self.pixel.weights[0, dead] = 1
            self.semantic.misses[dead] = 0


def nearest_pair(
    z_sem: Tensor, z_pix: Tensor, sem_codebook: Tensor, pix_codebook: Tensor, scale: tuple[float, float]
) -> Tensor:
    """argmin over pairs of scale[0]^2 |z_sem - c_sem|^2 + scale[1]^2 |z_pix - c_pix|^2 (TokenFlow), ids [...]."""
    z = torch.cat([z_sem * scale[0], z_pix * scale[1]], dim=-1)
    return ops.nearest_code(z, torch.cat([sem_codebook * scale[0], pix_codebook * scale[1]], dim=-1), "l2")[1]


class Network(nn.Module):
    """Both branches and the codes of an arm. Every arm has all networks, whether it uses them or not."""

    def __init__(self, arm: Arm, teacher: Teacher, sizes: Sizes = SIZES) -> None:
        super().__init__()
        self.arm, self.commitment = arm, sizes.commitment
        self.vit = copy.deepcopy(teacher) if arm.feed == "image" else None
        self.head = SemanticHead([teacher.width], sizes.dim)
        self.semantic_decoder = SemanticDecoder(sizes.network(sizes.semantic_depth), sizes.dim, teacher.width, GRID**2)
        self.encoder = PixelEncoder(sizes.network(sizes.depth), PATCH, GRID, sizes.dim)
        self.decoder = PixelDecoder(sizes.network(sizes.depth), PATCH, GRID, 2 * sizes.dim)
        self.codes = Codes(arm, sizes.dim)

    def modules_of(self, parts: set[str], training: bool = False) -> list[nn.Module]:
        """The modules of branches, besides the frozen teacher; those that only training needs if `training`."""
        found: list[nn.Module | None] = []
        if "semantic" in parts:
            found += [self.vit, self.head, self.semantic_decoder if training else None]
        if "pixel" in parts:
            found += [self.decoder, None if self.arm.kind == "semantic" else self.encoder]
        return [module for module in found if module is not None]

    def z_sem(self, images: Tensor, features: Tensor) -> Tensor:
        """z_sem [B, 8, 8, dim] from the teacher's features, or from images [B, 3, 64, 64] by the arm's own encoder."""
        if self.vit is not None:
            features = self.vit.vit.forward_intermediates(
                (images - self.vit.mean) / self.vit.std, indices=[self.vit.block], intermediates_only=True
            )[0].permute(0, 2, 3, 1)
        return self.head(features.float())

    def trained(self, parts: set[str]) -> list[nn.Parameter]:
        return [p.requires_grad_() for module in self.modules_of(parts, True) for p in module.parameters()]

    @torch.no_grad()
    def encode(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images and their features -> what `Codes.search` returns."""
        found = []
        for some, their_features in zip(images.split(BATCH), features.split(BATCH), strict=True):
            with bf16():
                x = some.float() / 255
                z_sem, z_pix = self.z_sem(x, their_features), self.encoder(x)
            found.append(self.codes.search(z_sem.float(), z_pix.float()))
        i, p = zip(*found, strict=True)
        return torch.cat(i), torch.cat(p)

    @torch.no_grad()
    def decode(self, q_sem: Tensor, q_pix: Tensor) -> Tensor:
        """Images [N, 3, 64, 64] in 0..1 from code vectors [N, 8, 8, dim]."""
        with bf16():
            images = [self.decoder(q) for q in torch.cat([q_sem, q_pix], dim=-1).split(BATCH)]
        return torch.cat(images).float().clamp(0, 1)


def stages(arm: Arm) -> list[set[str]]:
    if arm.kind == "flat":
        return [{"pixel"}]
    return [{"semantic", "pixel"}] if arm.kind in ("joint", "shared") else [{"semantic"}, {"pixel"}]


def fit(net: Network, parts: set[str], images: Tensor, features: Tensor, steps: int, batch: int, seed: int) -> float:
    """Train `parts` of the network on uint8 images [N, 3, 64, 64] and the teacher's features [N, 8, 8, C].

    The semantic loss is cosine + L1 to the standardised features + commitment, with the weight of `Sizes`. The pixel
    loss is L1 + 5 L2 + 0.25 commitment, with a tenth of the images decoded from the semantic id alone. The first fifth
    of the steps runs without quantisation.

    Returns:
        the seconds that it took.
    """
    began = time.perf_counter()
    codes, drawing = net.codes, Generator().manual_seed(seed)
    parameters = net.trained(parts)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.05 * steps), 0.01 + 0.99 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    semantic, pixel = ("semantic" in parts), ("pixel" in parts)
    with_pixels = pixel and net.arm.kind != "semantic"
    quantised_from = steps // 5
    if semantic:
        net.head.set_statistics(features[:500].float().flatten(0, 2))
    for step in progress(range(steps), f"train {' and '.join(sorted(parts))} codes"):
        if step == quantised_from:
            _initialize(net, parts, images, features, drawing)
        pick = torch.randint(len(images), (batch,), generator=drawing)
        drop = torch.rand(batch, 1, 1, 1, generator=drawing) < 0.1
        x, target = images[pick].float() / 255, features[pick].float()
        quantise = step >= quantised_from
        loss = torch.zeros(())
        with bf16():
            with torch.set_grad_enabled(semantic):
                z_sem = net.z_sem(x, target)
            z_pix = net.encoder(x).float() if with_pixels else torch.zeros_like(z_sem)
            tokens = z_sem.detach(), z_pix.detach() if with_pixels and quantise else None
            q_sem, q_pix = torch.zeros_like(z_sem) if net.arm.kind == "flat" else z_sem, z_pix
            if quantise or (codes.semantic is not None and not semantic):  # a frozen semantic branch already has codes
                i, p = codes.search(*tokens)
                c_sem, c_pix = codes.vectors(i, p)
                if codes.semantic is not None:
                    q_sem = straight_through(z_sem, c_sem)
                    loss = loss + (semantic and net.commitment * F.mse_loss(z_sem, c_sem))
                if with_pixels and quantise:
                    q_pix = straight_through(z_pix, c_pix)
                    loss = loss + 0.25 * F.mse_loss(z_pix, c_pix)
                    mean = codes.without_pixels(i, p)
                    q_pix = q_pix if mean is None else torch.where(drop, mean, q_pix)
            if semantic:
                predicted = net.semantic_decoder(q_sem).float()
                wanted = net.head.standardize(target)
                loss = loss + 1 - F.cosine_similarity(predicted, wanted, dim=-1).mean() + F.l1_loss(predicted, wanted)
            if pixel:
                decoded = net.decoder(torch.cat([q_sem, q_pix], dim=-1)).float()
                loss = loss + F.l1_loss(decoded, x) + 5 * F.mse_loss(decoded, x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if quantise:
            codes.update(*tokens, i, p, parts, drawing)
    return time.perf_counter() - began


@torch.no_grad()
def _initialize(net: Network, parts: set[str], images: Tensor, features: Tensor, draw: Generator) -> None:
    """Set the codebooks of `parts` by k-means on 16 tokens a code, from at least 500 images."""
    need = max(500, net.codes.vocabulary * 16 // GRID**2)
    pick = torch.randperm(len(images), generator=draw)[:need]
    sem, pix = [], []
    for some in pick.split(BATCH):
        x = images[some].float() / 255
        with bf16():
            sem.append(net.z_sem(x, features[some]).float().flatten(0, 2))
            if "pixel" in parts:
                pix.append(net.encoder(x).float().flatten(0, 2))
    if "semantic" in parts:
        net.codes.initialize_semantic(torch.cat(sem), draw)
    if "pixel" in parts:
        net.codes.initialize_pixel(torch.cat(sem), torch.cat(pix), draw)
