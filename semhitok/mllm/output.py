"""What an LLM does to its logits besides multiplying its last hidden states by the rows of its head.

Cohere, Granite and others scale them, Gemma and others cap them softly: cap * tanh(logit / cap). The configuration says
so. All ids share one softmax, so the same is done to the logits of image and special ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# Settings of transformers, and whether they multiply or divide the logits.
MULTIPLY = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDE = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIED_BY_SCALING = ("hyperclovax",)  # a relative of Granite that multiplies by `logits_scaling`


class OutputRule(NamedTuple):
    """Logits are `cap_logits(scale_hidden(hidden) @ rows.T)`; a scale of 1 and no cap leave them as they are."""

    scale: float = 1.0
    softcap: float | None = None

    def scale_hidden(self, hidden: Tensor) -> Tensor:
        """Last hidden states, scaled in place of the logits."""
        return hidden if self.scale == 1 else hidden * self.scale

    def cap_logits(self, logits: Tensor) -> Tensor:
        """Logits between -softcap and softcap."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def output_rule(config: PreTrainedConfig) -> OutputRule:
    """What the LLM of this configuration does to its logits."""

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, (int, float)) and value else None

    scale = math.prod(number(name) or 1.0 for name in MULTIPLY)
    divisor = math.prod(number(name) or 1.0 for name in DIVIDE)
    scale = scale * divisor if config.model_type in MULTIPLIED_BY_SCALING else scale / divisor
    return OutputRule(scale, next(filter(None, map(number, CAPS)), None))


@torch.no_grad()
def check_logits(llm: PreTrainedModel, logits: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError unless `logits` of a few ids [1, T] are those of the LLM, which must also have a cache.

    An LLM that cannot run on its device (on the meta device, or with flash attention on a CPU) is not compared.
    """
    rows: Any = llm.get_input_embeddings()
    modes = [(module, module.training) for module in llm.modules()]
    llm.eval()  # without dropout
    try:
        ids = torch.arange(min(4, len(rows.weight)), device=rows.weight.device)[None]
        if ids.is_meta:
            return
        try:
            output = llm(ids, use_cache=True)
        except (RuntimeError, ImportError, ValueError):
            return
        name = type(llm).__name__
        if getattr(output, "past_key_values", None) is None:
            raise ValueError(f"llm: expected one that keeps keys and values of earlier ids, got {name}")
        expected = output.logits.float()
        found = logits(ids)[..., : expected.shape[-1]].float()
        # Half of the digits: two ways to compute the same differ by less, another formula by more.
        limit = math.sqrt(torch.finfo(output.logits.dtype).eps) * expected.abs().max()
        if not (found - expected).abs().max() <= limit:
            raise ValueError(
                f"llm: expected logits that are hidden states times rows of a head, got others from {name}"
            )
    finally:
        for module, training in modes:
            module.training = training
