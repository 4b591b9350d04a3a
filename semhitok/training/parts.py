"""What is trained: batches with their random numbers, and parts (modules with an optimiser of their own).

Everything random about an image follows from the seed, the step and its place in the global batch, never from the
process that has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Generator, Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from semhitok import distributed
from semhitok.config import OptimizerConfig, TrainConfig
from semhitok.models.vit import Trunk


def generator(*key: object) -> Generator:
    """A generator whose numbers follow from the key alone, on every process and machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_everything(*key: object) -> None:
    """Torch's own generators too, for whatever draws from them: they need no place in a checkpoint then."""
    torch.manual_seed(generator(*key).initial_seed())


@dataclass
class Batch:
    """A micro-batch on its device: images [b, 3, H, W] in [0, 1] from place `first` of a global batch of `total`."""

    images: Tensor
    first: int
    total: int
    key: tuple[object, ...]
    predicted: Tensor | None = None  # what the network made of it, for the critic

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Random numbers in [0, 1), [b, *shape]; those of an image depend on its place in the global batch only."""
        numbers = torch.rand(self.total, *shape, generator=generator(*self.key, purpose))
        return numbers[self.first : self.first + len(self.images)].to(self.images.device)

    def uniform_shared(self, purpose: str, n: int) -> Tensor:
        """Random numbers in [0, 1), [n], the same for all images of the global batch."""
        return torch.rand(n, generator=generator(*self.key, purpose)).to(self.images.device)

    @staticmethod
    def evidence(batches: Sequence[Batch]) -> dict[str, Any]:
        """What to keep of a step whose loss is not finite."""
        images = torch.cat([b.images for b in batches]).cpu()
        return {"images": images, "first": batches[0].first, "total": batches[0].total}


class Part:
    """A module with an optimiser of its own. Calling it runs it under DDP or FSDP, where there are processes.

    Args:
        name: "network" or "critic".
        module: whose parameters with gradient are trained.
        config: of its optimiser.
        loss: batch, step -> loss (mean over the batch's images) and figures for the log.
        first_step: before this one it rests.
        ema_decay: of a moving average of the weights, which is then what is evaluated and published; 0 for none.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: OptimizerConfig,
        loss: Callable[[Any, int], tuple[Tensor, dict[str, Any]]],
        *,
        first_step: int = 0,
        ema_decay: float = 0.0,
    ) -> None:
        self.name, self.module, self.config, self.loss = name, module, config, loss
        self.first_step, self.ema_decay = first_step, ema_decay
        self.wrapped: nn.Module = module
        self.ema: list[Tensor] | None = None

    def __call__(self, *arguments: Any) -> Any:
        return self.wrapped(*arguments)

    def prepare(self, config: TrainConfig) -> None:
        """Wrap the module for the processes there are, and make the optimiser."""
        if config.compile:
            for module in self.module.modules():
                if isinstance(module, Trunk):
                    module.compile()
        for module in self.module.modules():
            if isinstance(module, Trunk):
                module.gradient_checkpointing = config.gradient_checkpointing
        if distributed.world_size() > 1:
            self.wrapped = shard(self.module) if config.shard and self.name == "network" else replicate(self.module)
        self.optimizer = make_optimizer(self.module, self.config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.ema_decay:
            self.ema = [p.detach().clone() for p in self.parameters]

    @contextlib.contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the backward pass of the last micro-batch only."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        yield

    def accumulate(self, batches: Sequence[Any], step: int) -> dict[str, Any]:
        """The gradient of the mean loss, clipped; figures for the log, means over the process's images."""
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Any] = {}
        for number, batch in enumerate(batches):
            with self.synchronised(number == len(batches) - 1):
                loss, figures = self.loss(batch, step)
                (loss / len(batches)).backward()
            for key, value in {"loss": loss, **figures}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                total[key] = total.get(key, 0.0) + value / len(batches)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        return {**total, "gradient_norm": norm.full_tensor() if hasattr(norm, "full_tensor") else norm}

    def step(self, step: int, steps: int) -> None:
        rate = learning_rate(step - self.first_step, steps - self.first_step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.ema is not None:
            # A young average would hold on to the weights it started from.
            decay = min(self.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def exchange_ema(self) -> None:
        """Weights and their moving average change places."""
        for parameter, average in zip(self.parameters, self.ema or (), strict=False):
            current = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(current)

    def state(self) -> dict[str, Any]:
        """Everything of this part, whole and on the CPU; a collective call under FSDP."""
        weights, optimizer = dcp.get_state_dict(self.module, self.optimizer, options=_WHOLE)
        state: dict[str, Any] = {"weights": weights, "optimizer": optimizer}
        if self.ema is not None:
            state["ema"] = [(e.full_tensor() if hasattr(e, "full_tensor") else e).cpu() for e in self.ema]
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        if self.ema is not None:
            # The averages go through the parameters, which know how they are split over processes.
            names = {id(p): name for name, p in self.module.named_parameters()}
            averages = dict(zip((names[id(p)] for p in self.parameters), state["ema"], strict=True))
            dcp.set_model_state_dict(self.module, {**state["weights"], **averages}, options=_WHOLE)
            for parameter, average in zip(self.parameters, self.ema, strict=True):
                average.copy_(parameter.detach())
        dcp.set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["weights"],
            optim_state_dict=state["optimizer"],
            options=_WHOLE,
        )


# Weights that are not trained here belong to other files.
_WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to lr, then a cosine down to min_lr."""
    warmup = max(1, round(steps * config.warmup_share))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not name.endswith("positions")
            (decayed if matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)


def replicate(module: nn.Module) -> nn.Module:
    """DDP. Buffers are not sent around: codebooks are kept equal by their own updates, which is checked."""
    device = next(module.parameters()).device
    ids = [device] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    # The name changed in PyTorch 2.14.
    new = "forward_sync_buffers" in inspect.signature(ddp).parameters
    options: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return ddp(module, ids, gradient_as_bucket_view=True, **options)


def shard(module: nn.Module) -> nn.Module:
    """FSDP2: every transformer block a unit of its own, the rest another."""
    # Outputs that are views are never changed in place here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Models of transformers tell by the names of classes what their blocks are.
    names = {name for child in module.modules() for name in getattr(child, "_no_split_modules", None) or ()}
    for child in list(module.modules()):
        for block in child.blocks if isinstance(child, Trunk) else [child] if type(child).__name__ in names else []:
            fully_shard(block)
    fully_shard(module)  # in place
    return module


def gather(
    batches: Iterator[list[Batch]], minimum: float, function: Callable[[Tensor], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Rows that `function` makes of images, of global batch after global batch, until `minimum` are there.

    The same rows in the same order on every process.
    """
    columns: list[list[Tensor]] = []
    count = 0
    with torch.no_grad():
        while count < minimum:
            rows = [function(batch.images) for batch in next(batches)]
            whole = [distributed.gather_rows(torch.cat(column)) for column in zip(*rows, strict=True)]
            columns = columns or [[] for _ in whole]
            for column, part in zip(columns, whole, strict=True):
                column.append(part)
            count += len(whole[0])
    return [torch.cat(column) for column in columns]
