"""Settings of an encoded corpus. Nothing here needs torch: the command line reads its flags from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from semhitok._settings import Count, Range, Settings
from semhitok.config import PRECISIONS

CROPS = ("centre", "ten")
ENGINES = ("local", "torchrun", "ray")


@dataclass(frozen=True)
class EncodingConfig(Settings):
    """What the bytes of a corpus depend on besides the tokenizer, the sources and the kind of device.

    Attributes:
        crop: "centre" (`resize_crop`) or "ten" (`ten_crops`).
        packed: store each id in as few bits as the vocabulary needs.
        caption: column of parquet files and field of JSON members that holds the caption; None takes "caption" or
            "text".
        batch_size: images encoded at once.
        images_per_shard: image files in a shard. Each webdataset shard and parquet file becomes one shard.
        precision: of the networks: "fp32" or "bf16" (autocast). With bf16 the first batch of each shard is also
            encoded in fp32, to report the share of ids that differ.

    Raises:
        ValueError: a value is out of range; the message names the setting.
    """

    crop: str = "centre"
    packed: bool = False
    caption: str | None = None
    batch_size: Annotated[int, Range(1, 10**6)] = 16
    images_per_shard: Count = 4096
    precision: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("crop", CROPS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
