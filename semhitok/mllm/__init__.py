"""The unified multimodal language model: text and images in one vocabulary (extra `mllm`: transformers)."""

from semhitok._optional import require

require("transformers", "mllm")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from semhitok.mllm.generate import Sampling, generate, generate_images  # noqa: E402
from semhitok.mllm.loss import group_cross_entropy, linear_cross_entropy  # noqa: E402
from semhitok.mllm.model import UnifiedMLLM, UnifiedMLLMConfig  # noqa: E402
from semhitok.mllm.packing import Packed, Sample, join, pack  # noqa: E402

__all__ = [
    "Packed", "Sample", "Sampling", "UnifiedMLLM", "UnifiedMLLMConfig", "generate", "generate_images",
    "group_cross_entropy", "join", "linear_cross_entropy", "pack",
]  # fmt: skip

AutoConfig.register(UnifiedMLLMConfig.model_type, UnifiedMLLMConfig)
AutoModelForCausalLM.register(UnifiedMLLMConfig, UnifiedMLLM)
