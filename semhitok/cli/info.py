"""Show what is in a checkpoint, an ids file or an encoded corpus; without one, what is installed and how it was built.

A corpus is read and checked completely: a shard that is missing, truncated or changed is an error.

examples:
  semhitok info
  semhitok info demo_output/checkpoint
  semhitok info ids.safetensors
  semhitok info corpus/
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from semhitok.cli import arguments, text

_PACKAGES = ("semhitok", "torch", "timm", "safetensors", "huggingface_hub", "pillow", "numpy")
_MAX_COUNTERS = 2**27  # 1 GiB; an ids file may claim any K and m


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject = "checkpoint folder, name on a hub, ids file, or folder of an encoded corpus"
    parser.add_argument("subject", metavar="CHECKPOINT|IDS|CORPUS", nargs="?", help=subject)


def run(args: argparse.Namespace) -> int:
    if args.subject is None:
        rows = _installation()
    elif Path(args.subject).is_file():
        rows = _ids(args.subject)
    elif Path(args.subject, "manifest.json").is_file() or Path(args.subject, "job.json").is_file():
        rows = _corpus(args.subject)
    else:
        rows = _checkpoint(args.subject)
    print(text.table(rows))
    return text.DONE


def _installation() -> Iterable[tuple[str, Any]]:
    import torch  # noqa: F401  (the extension needs its symbols)

    from semhitok import _C

    yield "python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    yield from _build("build", _C.build_info())


def _build(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Rows of the extension's build information: nested dicts, lists, plain values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _build(f"{name} {key}", inner)
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else value


def _checkpoint(name: str) -> Iterable[tuple[str, Any]]:
    tokenizer = arguments.load_tokenizer(name, "cpu", teacher=False)
    yield from _fields(tokenizer.config)
    for part, module in tokenizer.named_children():
        if count := _parameters(module):
            yield f"parameters {part}", f"{count:,}"
    codebooks = (tokenizer.quantizer.semantic.codebook, tokenizer.quantizer.pix_codebook)
    for part, codebook in zip(("semantic", "pixel"), codebooks, strict=True):
        yield f"codebook {part}", " x ".join(map(str, codebook.shape))
    if tokenizer.quantizer.offsets is not None:
        yield "sub-codes of a code", _spread(tokenizer.quantizer.sizes)
    yield "parameters without teacher", f"{_parameters(tokenizer):,}"
    yield "codebook hash", tokenizer.codebook_hash


def _ids(path: str) -> Iterable[tuple[str, Any]]:
    import torch

    from semhitok.corpus.ids_file import load_codes
    from semhitok.usage import CodeUsage

    file = load_codes(path)
    yield "shape", "{} images of {} x {} ids".format(*file.codes.shape)
    yield "num_codes K", f"{file.num_codes:,}"
    yield "num_sub_codes m", f"{file.num_sub_codes:,}"
    if file.offsets is not None:
        yield "sub-codes of a code", _spread(torch.tensor(file.offsets).diff())
    yield "codebook hash", file.codebook_hash
    if file.vocabulary.num_flat_codes <= _MAX_COUNTERS:
        usage = CodeUsage(file.num_codes, file.num_sub_codes, offsets=file.offsets)
        usage.update(file.codes)
        yield from text.usage_rows(usage.summary())


def _corpus(folder: str) -> Iterable[tuple[str, Any]]:
    from semhitok.corpus.format import read_manifest, verify

    layout, manifest = read_manifest(folder)
    usage = verify(folder)
    totals = manifest.get("totals", {})
    for key in ("images", "skipped", "rows", "captions", "bytes"):
        if key not in totals:
            raise ValueError(f"{folder}: manifest.json: totals: expected {key} among them")
    yield "shards", f"{len(manifest['shards']):,}, all as the manifest says"
    yield "images", f"{totals['images']:,}, {totals['skipped']:,} skipped"
    yield "rows", "{:,} of {} x {} ids, {:,} with captions".format(totals["rows"], *layout.grid, totals["captions"])
    yield "ids", f"packed, {layout.bits} bits" if layout.packed else str(layout.schema().field("ids").type.value_type)
    yield "bytes", f"{totals['bytes']:,}"
    yield "num_codes K", f"{layout.num_codes:,}"
    yield "num_sub_codes m", f"{layout.num_sub_codes:,}"
    yield "codebook hash", layout.codebook_hash
    yield from text.usage_rows(usage.summary())


def _fields(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Rows of a dataclass; the fields of a nested one are named `outer.inner`, of those in a list `outer.0.inner`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = {f".{n}": item for n, item in enumerate(value)} if isinstance(value, list) else {"": value}
        if nested and all(map(dataclasses.is_dataclass, nested.values())):
            for suffix, item in nested.items():
                yield from _fields(item, f"{prefix}{field.name}{suffix}.")
        else:
            yield f"{prefix}{field.name}", value


def _spread(sizes: Any) -> str:
    """The distribution of sizes [K] int64: least, quartiles, most."""
    ordered = sizes.sort().values
    quarters = [int(ordered[(len(ordered) - 1) * q // 4]) for q in range(5)]
    return "least {}, quartiles {} {} {}, most {}".format(*quarters)


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
