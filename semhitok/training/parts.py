"""Parts: modules that are trained, each with its own optimiser, schedule and moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn

from semhitok import distributed
from semhitok.config import OptimizerConfig
from semhitok.training import parallel

Figures = dict[str, Tensor | float]  # for the log, by name
Item = TypeVar("Item")
Output = TypeVar("Output")


class Part:
    """A module with its own optimiser. Calling it calls the module, under DDP or FSDP if there are several processes.

    Args:
        name: "network" or "critic".
        module: its parameters that require gradients are trained.
        config: of its optimiser.
        first_step: the step at which it starts to learn.
        ema_decay: of a moving average of the weights, which is then evaluated and published; 0 for none.
    """

    def __init__(
        self, name: str, module: nn.Module, config: OptimizerConfig, *, first_step: int = 0, ema_decay: float = 0.0
    ) -> None:
        self.name, self.module, self.config = name, module, config
        self.first_step, self.ema_decay = first_step, ema_decay
        self.wrapped: nn.Module = module
        self.ema: list[Tensor] | None = None

    def __call__(self, *arguments: Any) -> Any:
        return self.wrapped(*arguments)

    def setup(self, shard: bool) -> None:
        """Wrap the module for the processes there are, and create the optimiser. Only the network is ever split."""
        self.wrapped = parallel.wrap(self.module, shard and self.name == "network")
        self.optimizer = make_optimizer(self.module, self.config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.ema_decay:
            self.ema = [p.detach().clone() for p in self.parameters]

    def accumulate(
        self, items: Sequence[Item], loss: Callable[[Item], tuple[Tensor, Figures, Output]]
    ) -> tuple[Figures, list[Output]]:
        """Compute the gradient of the mean loss over the micro-batches, clipped.

        Args:
            items: the micro-batches.
            loss: of one of them: the loss (a mean over its images), figures for the log, and whatever the step needs
                later, which is handed back.

        Returns:
            Figures (means over the micro-batches), and what `loss` handed back for each.
        """
        self.optimizer.zero_grad(set_to_none=True)
        means: Figures = {}
        outputs: list[Output] = []
        for number, item in enumerate(items):
            with parallel.gradient_sync(self.wrapped, number == len(items) - 1):
                value, figures, output = loss(item)
                (value / len(items)).backward()
            for name, figure in {"loss": value, **figures}.items():
                figure = figure.detach() if isinstance(figure, Tensor) else figure
                means[name] = means.get(name, 0.0) + figure / len(items)
            outputs.append(output)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        return {**means, "gradient_norm": distributed.whole_tensor(norm)}, outputs

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, step: int, steps: int) -> None:
        """The optimiser's step number `step` of a stage of `steps`; nothing before `first_step`."""
        if step < self.first_step:
            return
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
        """Swap the weights and their moving average."""
        for parameter, average in zip(self.parameters, self.ema or (), strict=False):
            current = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(current)

    def state(self) -> dict[str, Any]:
        """Weights, optimiser and moving average, on the CPU; a collective call under FSDP."""
        weights, optimizer = dcp.get_state_dict(self.module, self.optimizer, options=_FULL)
        state: dict[str, Any] = {"weights": weights, "optimizer": optimizer}
        if self.ema is not None:
            state["ema"] = [distributed.whole_tensor(average).cpu() for average in self.ema]
        return state

    def outline(self) -> dict[str, Any]:
        """What a state must be like, see `check_like`."""
        weights = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        averages = {name: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for name, p in weights.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        outline = {"weights": weights, "optimizer": {"state": averages, "param_groups": groups}}
        return outline if self.ema is None else {**outline, "ema": self.ema}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        if self.ema is not None:
            # The averages go through the parameters, which know how they are split over processes.
            names = {id(p): name for name, p in self.module.named_parameters()}
            averages = dict(zip((names[id(p)] for p in self.parameters), state["ema"], strict=True))
            dcp.set_model_state_dict(self.module, {**state["weights"], **averages}, options=_FULL)
            for parameter, average in zip(self.parameters, self.ema, strict=True):
                average.copy_(parameter.detach())
        states = {"model_state_dict": state["weights"], "optim_state_dict": state["optimizer"]}
        dcp.set_state_dict(self.module, self.optimizer, **states, options=_FULL)


# Frozen weights belong to other files.
_FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def check_like(found: Any, expected: Any, where: str) -> None:
    """ValueError unless `found` has the keys, lengths, kinds and shapes of `expected`; of a dict it may have more keys.

    In place of None anything may stand.
    """
    if isinstance(expected, Tensor):
        shape = list(found.shape) if isinstance(found, Tensor) else None
        if shape != list(expected.shape) or found.is_floating_point() != expected.is_floating_point():
            got = f"{found.dtype} {shape}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{where}: expected {expected.dtype} {list(expected.shape)}, got {got}")
        return
    number = isinstance(expected, (int, float)) and not isinstance(expected, bool)
    kinds = (int, float) if number else (list, tuple) if isinstance(expected, (list, tuple)) else (type(expected),)
    if expected is not None and (not isinstance(found, kinds) or (number and isinstance(found, bool))):
        raise ValueError(f"{where}: expected {kinds[0].__name__}, got {type(found).__name__}")
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key not in found:
                raise ValueError(f"{where}: expected {key} in it, got none")
            check_like(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            raise ValueError(f"{where}: expected {len(expected)} entries, got {len(found)}")
        for n, value in enumerate(expected):
            check_like(found[n], value, f"{where}.{n}")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to lr, then a cosine down to min_lr."""
    warmup = max(1, round(steps * config.warmup_share))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW of the parameters that require gradients, with weight decay on matrices but not on positions."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not name.endswith("positions")
            (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
