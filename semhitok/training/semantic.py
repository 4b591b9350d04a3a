"""Stage 1: the semantic branch learns the teacher's features (paper: VQ-KD, after BEiT v2).

loss = cosine_weight (1 - cos(decoder(q), t)) + l1_weight |decoder(q) - t| + commitment

with t the teacher's standardised features and q the nearest of K unit codes. With several teachers, cosine and L1 are
computed for each and averaged with their shares. The codes follow their tokens by a moving average; unused ones are
restarted. The first steps run without quantisation, then k-means sets the codebook.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok import distributed
from semhitok.config import SemanticStageConfig, TrainConfig
from semhitok.data.batch import Batch, keyed_generator
from semhitok.evaluation.held_out import evaluate_held_out
from semhitok.tokenizer import TEACHERS, SemHiTok
from semhitok.training.log import usage_figures, usage_window
from semhitok.training.parallel import gather_tokens
from semhitok.training.parts import Figures, Part
from semhitok.training.stage import Evaluation, TokenizerStage
from semhitok.usage import CodeUsage

MAX_FEATURES = 2**33  # bytes on the disk, of the features of fixed crops


class SemanticNetwork(nn.Module):
    """What this stage trains, as one module: features [B, h, w, C] -> features predicted from their codes."""

    def __init__(self, model: SemHiTok) -> None:
        super().__init__()
        self.head = model.semantic_head
        self.quantizer = model.quantizer.semantic
        self.decoder = model.semantic_decoder

    def forward(self, features: Tensor, quantise: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Predicted features, z_sem, codes (None if not quantised), commitment loss."""
        z = self.head(features)
        if not quantise:
            return self.decoder(z), z, None, z.new_zeros(())
        q, codes, commitment = self.quantizer(z)
        return self.decoder(q), z, codes, commitment


Tokens = tuple[Tensor, Tensor]  # z_sem [B, h, w, Ds] and codes [B, h, w], without gradient


class SemanticStage(TokenizerStage[Tokens | None]):
    """Trains `semantic_head`, `semantic_decoder` and the semantic codebook of `model`."""

    name = "semantic"
    config: SemanticStageConfig

    def __init__(self, model: SemHiTok, run_config: TrainConfig) -> None:
        super().__init__(model, run_config)
        config, self.best = self.config, ("cosine", self.save_model)
        self.head, self.quantizer = model.semantic_head, model.quantizer.semantic
        self.quantizer.decay = config.decay
        self.network = Part("network", SemanticNetwork(model).train().requires_grad_(True), config.optimizer)
        self.parts = [self.network]
        teachers = len(model.config.teachers)
        self.cosine_names = [f"cosine_{n + 1}" for n in range(teachers)] if teachers > 1 else []  # of each teacher
        self.window = usage_window(model.config.num_codes, config.batch_size * model.config.grid_size**2)

    def prepare(self, check_stop: Callable[[], None]) -> None:
        """Compute the teacher's features of all fixed crops, unless they are too many."""
        if self.fixed is None or not self.fixed.worthwhile(self.config):
            return
        size = 4 * self.fixed.count * self.model.config.grid_size**2 * self.head.mean.numel()
        if size > MAX_FEATURES:
            if distributed.rank() == 0:
                print(
                    f"semhitok: the teacher's features of {self.fixed.count} fixed crops would take "
                    f"{size / 2**30:.1f} GiB, more than {MAX_FEATURES >> 30}: the teacher computes them in every step",
                    file=sys.stderr,
                )
            return
        made_by = self.teacher_identity()
        self.known_features = self.fixed.find("features", made_by)
        if self.known_features is None:
            self.known_features = self.fixed.make("features", made_by, self.features, check_stop)

    def before_step(self, step: int, spare: Iterator[list[Batch]], seed: int) -> None:
        needed = self.config.init_tokens_per_code * self.model.config.num_codes
        if step == 0:
            (features,) = gather_tokens(spare, needed, lambda x: (self.features(x).flatten(0, 2),))
            self.head.set_statistics(features)
            distributed.check_equal(torch.cat([self.head.mean, self.head.std]), "statistics of the features")
        if step == self.config.continuous_steps:
            (z,) = gather_tokens(spare, needed, lambda x: (self.network(self.features(x), False)[1].flatten(0, 2),))
            generator = keyed_generator(seed, self.name, "kmeans")
            self.quantizer.initialize(z, self.config.kmeans_iterations, generator=generator)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Figures, Tokens | None]:
        config = self.config
        features = self.features(batch)
        quantise = step >= config.continuous_steps
        with self.autocast():
            predicted, z, codes, commitment = self.network(features, quantise)
        pairs = self.head.pairs(predicted, self.head.standardize(features))
        cosines = [1 - F.cosine_similarity(p, t, dim=-1).mean() for p, t in pairs]
        cosine, l1 = self.head.average(cosines), self.head.average([F.l1_loss(p, t) for p, t in pairs])
        loss = config.cosine_weight * cosine + config.l1_weight * l1 + config.commitment_weight * commitment
        tokens = None if codes is None else (z.detach(), codes)
        figures = {"cosine": cosine, **dict(zip(self.cosine_names, cosines, strict=False)), "l1": l1}
        return loss, {**figures, "commitment": commitment}, tokens

    @torch.no_grad()
    def after_step(self, outputs: Sequence[Tokens | None], step: int, seed: int) -> Figures:
        tokens = [output for output in outputs if output is not None]
        if not tokens:
            return {}
        z, codes = (torch.cat(column) for column in zip(*tokens, strict=True))
        self.quantizer.update(z, codes)
        generator = keyed_generator(seed, self.name, step, "restart")
        restarted = self.quantizer.restart(z, self.config.restart_window, generator=generator)
        figures = usage_figures(self.quantizer.usage, step, self.window)
        usage = figures.get("semantic_usage", float("inf"))
        # With few codes left in use a run does not recover.
        if usage < self.config.collapse_usage and distributed.rank() == 0:
            print(
                f"semhitok: warning: the semantic codebook is collapsing: after step {step + 1} {usage:.1%} of its "
                f"codes are in use (perplexity {figures['semantic_perplexity']:.1f} of {self.model.config.num_codes})",
                file=sys.stderr,
            )
        # There are no sub-codes yet, so the other views say nothing.
        return {"restarted": restarted, **{k: v for k, v in figures.items() if k.startswith("semantic_")}}

    def counters(self) -> dict[str, Tensor]:
        counters = {"misses": self.quantizer.misses, "usage": self.quantizer.usage.counts}
        return counters | {k: v for k, v in self.model.stored_state().items() if k.startswith(TEACHERS)}

    def codebooks(self) -> dict[str, Tensor]:
        return {"codebook": self.quantizer.codebook, "misses": self.quantizer.misses}

    def evaluate(self, batches: Iterator[tuple[Tensor, int]]) -> Evaluation:
        """Cosine distance to the teachers' features and usage of the codes, on held-out images."""

        def distances(images: Tensor) -> tuple[Tensor, Tensor]:
            features = self.features(Batch(images, 0, len(images)))
            with self.autocast():
                predicted, _, codes, _ = self.network(features, True)
            assert codes is not None
            pairs = self.head.pairs(predicted, self.head.standardize(features))
            distances = [1 - F.cosine_similarity(p, t, dim=-1).mean((1, 2)) for p, t in pairs]
            return torch.stack([self.head.average(distances), *distances], dim=-1), codes

        names = ["cosine", *self.cosine_names]
        functions = {name: lambda distances, images, n=n: distances[:, n] for n, name in enumerate(names)}
        usage = CodeUsage(self.model.config.num_codes, 1, self.device)
        figures, _ = evaluate_held_out(distances, batches, functions, usage, self.device)
        return {k: v for k, v in figures.items() if not k.startswith(("flat", "group"))}, None
