"""The designs that `run.py` compares: the same networks and one training loop, other codebooks and stages.

| kind        | id of a patch                                          | trained                              |
|-------------|--------------------------------------------------------|--------------------------------------|
| semantic    | i of K                                                 | semantic branch, then decoder        |
| flat        | one of K * m pixel codes                               | pixel branch                         |
| independent | i of K and j of m pixel codes that all patches share   | semantic branch, then pixel branch   |
| shared      | one of K * m pairs of code vectors (TokenFlow's rule)  | both at once                         |
| joint       | i of K and j of the m sub-codes that i owns            | both at once                         |
| staged      | the same: SemHiTok                                     | semantic branch, then pixel branch   |
| ragged      | the same, m_i by marginal distortion, K * m in all     | semantic branch, then pixel branch   |

Every branch gets the same number of updates in all arms that have it, on the same batches.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semhitok import ops
from semhitok.config import ViTConfig
from semhitok.models.pixel import PixelDecoder, PixelEncoder
from semhitok.models.semantic import SemanticDecoder, SemanticHead
from semhitok.models.teacher import Teacher
from semhitok.quantizer import HierarchicalQuantizer, SemanticQuantizer, straight_through

DIM = 16  # of semantic and of pixel codes
PATCH, GRID = 8, 8
NETWORK = ViTConfig(96, 2, 3)
RESTART = 100  # tokens of its share that a code may miss
DECAY = 0.97


class Arm(NamedTuple):
    """A row of the table. K, m: codes; feed: what the semantic branch reads, frozen features or images."""

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
    """The codebooks of an arm, made of the library's quantisers.

    `semantic` holds the semantic codes (None: flat). `pixel` holds the pixel codes (None: semantic) in groups, of which
    a patch may use one: that of its semantic code (joint, staged, ragged), or the only one there is.
    """

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.arm = arm
        kind, total = arm.kind, arm.K * arm.m
        groups, each = (arm.K, arm.m) if kind in ("joint", "staged", "ragged") else (1, total)
        if kind == "independent":
            each = arm.m
        self.pixel = None
        if kind != "semantic":
            self.pixel = HierarchicalQuantizer(groups, each, DIM, DIM, decay=DECAY, adaptive=kind == "ragged")
        self.semantic = None
        if kind != "flat":
            self.semantic = SemanticQuantizer(total if kind == "shared" else arm.K, DIM, decay=DECAY)
        self.scale = (1.0, 1.0)  # of both halves of a pair, for the shared index

    @property
    def vocabulary(self) -> int:
        return self.arm.K * self.arm.m

    def search(self, z_sem: Tensor, z_pix: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [..., 16] -> ids of their semantic and of their pixel code vector, [...] each.

        z_pix None leaves the pixel ids 0; for "semantic" they are, always.
        """
        if self.arm.kind == "shared" and z_pix is not None:
            found = nearest_pair(z_sem, z_pix, self.semantic.codebook, self.pixel.pix_codebook[0], self.scale)
            return found, found
        i = torch.zeros(z_sem.shape[:-1], dtype=torch.int64)
        if self.semantic is not None:
            _, i = ops.nearest_code(z_sem, self.semantic.codebook, "ip")
        if self.pixel is None or z_pix is None:
            return i, torch.zeros_like(i)
        group = self.group(i)
        _, j = ops.nearest_subcode(z_pix, self.pixel.pix_codebook, group, "l2", self.pixel.offsets)
        return i, self.pixel.join(group, j)

    def group(self, i: Tensor) -> Tensor:
        """Of semantic ids, the groups of pixel codes that their patches may use."""
        return i if self.pixel.num_codes > 1 else torch.zeros_like(i)

    def ids(self, i: Tensor, p: Tensor) -> Tensor:
        """The flat id of a patch from what `search` returned."""
        return {"semantic": i, "independent": i * self.arm.m + p}.get(self.arm.kind, p)

    def vectors(self, i: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """q_sem and q_pix of what `search` returned; zeros for codes that the arm has not."""
        zeros = torch.zeros(*i.shape, DIM)
        q_sem = zeros if self.semantic is None else self.semantic.codebook[i]
        return q_sem, zeros if self.pixel is None else self.pixel.pix_codebook.flatten(0, -2)[p]

    def without_pixels(self, i: Tensor, p: Tensor) -> Tensor | None:
        """What stands for q_pix when only the semantic id is known; None where there is no such part."""
        if self.arm.kind in ("flat", "shared"):
            return None
        if self.pixel is None:
            return torch.zeros(*i.shape, DIM)
        return self.pixel.group_means(p)

    @torch.no_grad()
    def initialize_semantic(self, z_sem: Tensor, generator: Generator) -> None:
        if self.arm.kind != "shared":
            self.semantic.initialize(z_sem, generator=generator)

    @torch.no_grad()
    def initialize_pixel(self, z_sem: Tensor, z_pix: Tensor, generator: Generator) -> None:
        """k-means on tokens [N, 16]; for pairs, on both halves at once."""
        if self.arm.kind == "shared":
            self.scale = tuple((0.5 / z.var(0).sum()).sqrt().item() for z in (z_sem, z_pix))
            both = HierarchicalQuantizer(1, self.vocabulary, 1, 2 * DIM)
            group = torch.zeros(len(z_pix), dtype=torch.int64)
            tokens = torch.cat([z_sem * self.scale[0], z_pix * self.scale[1]], -1)
            both.initialize(tokens, group, generator=generator)
            centres = both.pix_codebook[0]
            self.semantic.codebook.copy_(F.normalize(centres[:, :DIM], dim=-1))
            self.pixel.pix_codebook.copy_(centres[None, :, DIM:] / self.scale[1])
            return
        i, _ = self.search(z_sem, None)
        if self.pixel is not None:
            self.pixel.initialize(z_pix, self.group(i), generator=generator)

    @torch.no_grad()
    def update(
        self, z_sem: Tensor, z_pix: Tensor | None, i: Tensor, p: Tensor, parts: set[str], draw: Generator
    ) -> None:
        """Moving averages and restarts of the codebooks of `parts`, after a step's tokens."""
        if "semantic" in parts and self.semantic is not None:
            self.semantic.update(z_sem, i)
        if "pixel" in parts and self.pixel is not None:
            self.pixel.update(z_pix, p)
        if self.arm.kind == "shared":  # both halves of a pair move onto the same token
            dead = (self.semantic.misses >= RESTART * self.vocabulary).nonzero().squeeze(1)
            pick = torch.randint(i.numel(), (len(dead),), generator=draw)
            self.semantic.codebook[dead] = z_sem.reshape(-1, DIM)[pick]
            self.pixel.pix_codebook[0, dead] = z_pix.reshape(-1, DIM)[pick]
            self.pixel.weights[0, dead] = 1
            self.semantic.misses[dead] = 0
            return
        if "semantic" in parts and self.semantic is not None:
            self.semantic.restart(z_sem, RESTART, generator=draw)
        if "pixel" in parts and self.pixel is not None:
            window = RESTART if self.pixel.num_codes > 1 else RESTART * self.pixel.num_sub_codes
            self.pixel.restart(z_pix, p, window, generator=draw)


def nearest_pair(
    z_sem: Tensor, z_pix: Tensor, sem_codebook: Tensor, pix_codebook: Tensor, scale: tuple[float, float]
) -> Tensor:
    """argmin over pairs of scale[0]^2 |z_sem - c_sem|^2 + scale[1]^2 |z_pix - c_pix|^2 (TokenFlow), ids [...]."""
    z = torch.cat([z_sem * scale[0], z_pix * scale[1]], dim=-1)
    return ops.nearest_code(z, torch.cat([sem_codebook * scale[0], pix_codebook * scale[1]], dim=-1), "l2")[1]


class Network(nn.Module):
    """Both branches and the codes of an arm; every arm has the same networks, used or not."""

    def __init__(self, arm: Arm, teacher: Teacher) -> None:
        super().__init__()
        self.arm = arm
        self.vit = copy.deepcopy(teacher) if arm.feed == "image" else None
        self.head = SemanticHead(teacher.width, DIM)
        self.semantic_decoder = SemanticDecoder(ViTConfig(96, 1, 3), DIM, teacher.width, GRID**2)
        self.encoder = PixelEncoder(NETWORK, PATCH, GRID, DIM)
        self.decoder = PixelDecoder(NETWORK, PATCH, GRID, 2 * DIM)
        self.codes = Codes(arm)

    def used(self) -> list[nn.Module]:
        """The modules that a tokenizer of this design needs to encode and decode, besides the frozen teacher."""
        semantic = [m for m in (self.vit, self.head) if m is not None and self.arm.kind != "flat"]
        return [*semantic, self.decoder] + ([] if self.arm.kind == "semantic" else [self.encoder])

    def z_sem(self, images: Tensor, features: Tensor) -> Tensor:
        """z_sem [B, 8, 8, 16] from the teacher's features, or from images [B, 3, 64, 64] by the arm's own encoder."""
        if self.vit is not None:
            features = self.vit.vit.forward_intermediates(
                (images - self.vit.mean) / self.vit.std, indices=[self.vit.block], intermediates_only=True
            )[0].permute(0, 2, 3, 1)
        return self.head(features.float())

    def trained(self, parts: set[str]) -> list[nn.Parameter]:
        modules: list[nn.Module | None] = []
        if "semantic" in parts:
            modules += [self.vit, self.head, self.semantic_decoder]
        if "pixel" in parts:
            modules += [self.decoder] + ([] if self.arm.kind == "semantic" else [self.encoder])
        return [p.requires_grad_() for module in modules if module is not None for p in module.parameters()]

    @torch.no_grad()
    def encode(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images and their features -> what `Codes.search` returns."""
        with torch.autocast("cpu", torch.bfloat16):
            x = images.float() / 255
            z_sem, z_pix = self.z_sem(x, features), self.encoder(x)
        return self.codes.search(z_sem.float(), z_pix.float())

    @torch.no_grad()
    def decode(self, q_sem: Tensor, q_pix: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.decoder(torch.cat([q_sem, q_pix], dim=-1)).float().clamp(0, 1)


def stages(arm: Arm) -> list[set[str]]:
    if arm.kind == "flat":
        return [{"pixel"}]
    return [{"semantic", "pixel"}] if arm.kind in ("joint", "shared") else [{"semantic"}, {"pixel"}]


def fit(net: Network, parts: set[str], images: Tensor, features: Tensor, steps: int, batch: int, seed: int) -> None:
    """Train `parts` of the network on uint8 images [N, 3, 64, 64] and the teacher's features [N, 8, 8, C].

    semantic: cosine + L1 to the standardised features + commitment. pixel: L1 + 5 L2 + .25 commitment, a tenth of the
    images decoded from the semantic id alone. The first fifth of the steps runs without quantisation.
    """
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
    for step in range(steps):
        if step == quantised_from:
            _initialize(net, parts, images, features, drawing)
        pick = torch.randint(len(images), (batch,), generator=drawing)
        drop = torch.rand(batch, 1, 1, 1, generator=drawing) < 0.1
        x, target = images[pick].float() / 255, features[pick].float()
        quantise = step >= quantised_from
        loss = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(semantic):
                z_sem = net.z_sem(x, target)
            z_pix = net.encoder(x).float() if with_pixels else None
            q_sem, q_pix = z_sem, z_pix if with_pixels else torch.zeros_like(z_sem)
            if net.arm.kind == "flat":
                q_sem = torch.zeros_like(z_sem)
            # A frozen semantic branch has its codes from the start.
            if quantise or (net.codes.semantic is not None and not semantic):
                i, p = codes.search(z_sem.detach(), None if z_pix is None or not quantise else z_pix.detach())
                c_sem, c_pix = codes.vectors(i, p)
                if codes.semantic is not None:
                    q_sem = straight_through(z_sem, c_sem)
                    loss = loss + (semantic and (z_sem - c_sem).square().sum(-1).mean())
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
            codes.update(z_sem.detach(), None if z_pix is None else z_pix.detach(), i, p, parts, drawing)


@torch.no_grad()
def _initialize(net: Network, parts: set[str], images: Tensor, features: Tensor, draw: Generator) -> None:
    """Set the codebooks of `parts` by k-means on 16 tokens a code, at least on 500 images."""
    need = max(500, net.codes.vocabulary * 16 // GRID**2)
    pick = torch.randperm(len(images), generator=draw)[:need]
    sem, pix = [], []
    for some in pick.split(250):
        x = images[some].float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            sem.append(net.z_sem(x, features[some]).float().flatten(0, 2))
            if "pixel" in parts:
                pix.append(net.encoder(x).float().flatten(0, 2))
    if "semantic" in parts:
        net.codes.initialize_semantic(torch.cat(sem), draw)
    if "pixel" in parts:
        net.codes.initialize_pixel(torch.cat(sem), torch.cat(pix), draw)
