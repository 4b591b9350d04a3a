"""Parameters of each part of a full-size model, counted without allocating it: python -m semhitok.mllm.params"""

from __future__ import annotations

import argparse

import torch
from transformers import Qwen2Config

from semhitok.mllm.model import HEADS, UnifiedMLLM, UnifiedMLLMConfig


def qwen2_5_7b() -> Qwen2Config:
    """Sizes of Qwen2.5-7B, the paper's LLM. Its embedding has 152,064 rows, more than its tokenizer has words."""
    return Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def parameter_table(model: UnifiedMLLM) -> dict[str, int]:
    """Parameters of each part. Tied ones are counted once, in the first part. Codebooks (buffers) come last."""
    seen: set[int] = set()
    table = {}
    parts = [("text embedding", model.model.get_input_embeddings()), ("LLM's trunk", model.model)]
    parts += [(name.replace("_", " "), x) for name, x in model.named_children() if name not in ("model", "codebooks")]
    for name, module in parts:
        own = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
        seen |= own.keys()
        table[name] = sum(own.values())
    table["codebooks"] = sum(buffer.numel() for buffer in model.codebooks.buffers())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Parameters of Qwen2.5-7B with an image vocabulary.")
    parser.add_argument("--num-codes", type=int, default=24576, help="semantic codes K (default: %(default)s)")
    parser.add_argument("--num-sub-codes", type=int, default=8, help="sub-codes m of each (default: %(default)s)")
    parser.add_argument("--head", choices=HEADS, default="flat", help="(default: %(default)s)")
    args = parser.parse_args()
    config = UnifiedMLLMConfig(qwen2_5_7b(), args.num_codes, args.num_sub_codes, head=args.head)
    with torch.device("meta"):
        model = UnifiedMLLM(config)
    table = parameter_table(model)
    vocabulary = config.vocabulary
    print(f"text ids {vocabulary.text_size:,}, image ids {vocabulary.num_flat_codes:,}, all {vocabulary.size:,}\n")
    for name, count in table.items():
        print(f"{name:18} {count:14,}" + ("  (frozen, not counted)" if name == "codebooks" else ""))
    print(f"{'sum':18} {sum(table.values()) - table['codebooks']:14,}")


if __name__ == "__main__":
    main()
