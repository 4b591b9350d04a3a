"""The least time each search may take on this card, from what ceilings.py measured: the roofline of its design.

A search keeps several units busy at once: tensor cores or FMA pipes multiply, the integer and comparison units look for
the greatest score, the codebook streams from L2, tokens and ids cross HBM. The slowest of them is the floor and names
what limits the design; nothing is added for the start, the end, or waiting.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from semhitok import _C

SEARCHES = tuple(_C.cuda_searches())  # nearest_code_probe's capabilities on CUDA, simplest first


class Design(NamedTuple):
    tokens_per_block: int  # these share one reading of the codebook from L2
    instruction: str | None  # of the tensor cores; None: FMAs


DESIGNS = {
    "simt": Design(128, None),
    "few": Design(256, "mma.sync f16 m16n8k16"),
    "mma": Design(256, "mma.sync f16 m16n8k16"),
    "wgmma": Design(192, "wgmma f16 m64n128k16"),
    "certified": Design(256, "wgmma s8 m64n128k32"),
}

# certified: 16 three-way maxima for 32 scores, and 6 simpler instructions to keep what they find.
THREE_WAY_PER_SCORE = 16 / 32
TWO_WAY_PER_SCORE = 6 / 32
# The others, for a score: a comparison, and a select each for the score and for its id.
INSTRUCTIONS_PER_SCORE = 3
SPLIT_TERMS = 3  # fp16 products that together give an fp32 one
FP16_STEP, INT8_STEP = 16, 32  # depth of one tensor-core instruction
BYTES_OUT = 4 + 8  # a token's score and id


class Floor(NamedTuple):
    us: float
    limit: str  # the resource that takes longest


def padded(depth: int, step: int) -> int:
    return -(-depth // step) * step


def floor(search: str, n: int, k: int, d: int, ceilings: dict[str, Any]) -> Floor | None:
    """None if the card lacks the instruction that the search needs, or if there is no such search."""
    per_clock, mma = ceilings["issue_per_sm_per_clock"], ceilings["mma_tflops"]
    a_second = ceilings["sms"] * ceilings["sm_clock_mhz"] * 1e6
    scores = n * k

    def issue(instruction: str, per_score: float) -> float:
        return scores * per_score / (per_clock[instruction] * a_second)

    def tensor(instruction: str, products: int) -> float:
        return 2 * scores * products / (mma[instruction] * 1e12)

    design = DESIGNS.get(search)
    if design is None or (design.instruction is not None and mma[design.instruction] is None):
        return None
    instruction = design.instruction
    if instruction is None:
        times, row_bytes = {"FMA": issue("FFMA", d), "compare": issue("VIMNMX", INSTRUCTIONS_PER_SCORE)}, 4 * d
    elif search == "certified":
        row_bytes = padded(d, INT8_STEP)
        best = issue("VIMNMX3", THREE_WAY_PER_SCORE) + issue("VIMNMX", TWO_WAY_PER_SCORE)
        times = {"MMA": tensor(instruction, row_bytes), "max": best}
    else:
        depth = padded(d, FP16_STEP)
        row_bytes = 4 * d if search == "few" else 2 * 2 * depth  # as it is, or its high and low halves
        compare = issue("VIMNMX", INSTRUCTIONS_PER_SCORE)
        times = {"MMA": tensor(instruction, SPLIT_TERMS * depth), "compare": compare}
    times["L2"] = -(-n // design.tokens_per_block) * k * row_bytes / (ceilings["l2_read_gb_s"] * 1e9)
    times["HBM"] = (4 * d * (n + k) + BYTES_OUT * n) / (ceilings["hbm_read_gb_s"] * 1e9)
    limit = max(times, key=lambda name: times[name])
    return Floor(1e6 * times[limit], limit)
