"""SemHiTok, the image tokenizer: images -> one discrete id for every patch -> images.

image -> teacher -> semantic head -- z_sem --+
image -> pixel encoder ------------- z_pix --+-> hierarchical quantizer -> ids -> pixel decoder -> image
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semhitok._files import parse_json, write_atomic, write_json
from semhitok._optional import require
from semhitok.config import SemHiTokConfig
from semhitok.grouping import check_offsets
from semhitok.models.pixel import PixelDecoder, PixelEncoder
from semhitok.models.semantic import SemanticDecoder, SemanticHead
from semhitok.models.teacher import Teacher
from semhitok.processor import ROUNDING as ROUNDING
from semhitok.processor import ImageProcessor, check_range
from semhitok.quantizer import HierarchicalQuantizer
from semhitok.vocabulary import Vocabulary, codebook_hash

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1
PACKAGED = Path(__file__).with_name("pretrained")  # checkpoints that come with this package, by name
TEACHERS = ("teacher.", "more_teachers.")  # the weights of teachers in a state dict begin so


class Features(NamedTuple):
    """The code vectors of ids: semantic [B, h, w, Ds] and pixel [B, h, w, Dp], fp32."""

    semantic: Tensor
    pixel: Tensor


class SemHiTok(nn.Module):
    """The unified image tokenizer (paper: SemHiTok).

    Images are float tensors [B, 3, image_size, image_size] in [0, 1]. Ids are int64 tensors [B, h, w] in [0, K * m),
    row by row from the top left, with h = w = image_size / patch_size. An empty batch gives an empty one.

    `half()`, `to(dtype)` and the like cast the networks. Codebooks and the search for the nearest code stay in fp32, so
    the ids and the codebooks' hash keep their meaning; fp16 and bf16 networks choose other codes for some patches.
    `decode` returns images in the dtype of the networks.

    Args:
        config: sizes and the teachers; `semhitok.config.preset(name)` gives that of a preset.
        teacher: build the frozen teachers, which `encode` needs; False for decoding only.
        load_teacher: fetch or read the teachers' weights, if `config` names any; False leaves them random. A sequence
            says it for each teacher.

    Raises:
        ImportError: timm is not installed, or transformers for a teacher of it.
        OSError, ValueError: from `Teacher`.
    """

    def __init__(
        self, config: SemHiTokConfig, *, teacher: bool = True, load_teacher: bool | Sequence[bool] = True
    ) -> None:
        super().__init__()
        self.config = config
        self.processor = ImageProcessor(config.image_size)
        grid, tokens = config.grid_size, config.grid_size**2
        loads = [load_teacher] * len(config.teachers) if isinstance(load_teacher, bool) else load_teacher
        # Even without the teachers, their widths are needed: they shape the semantic branch.
        with contextlib.nullcontext() if teacher else torch.device("meta"):
            frozen = [Teacher(t, grid, load=load and teacher) for t, load in zip(config.teachers, loads, strict=True)]
        self.teacher = frozen[0] if teacher else None
        self.more_teachers = nn.ModuleList(frozen[1:] if teacher else [])
        widths = [t.width for t in frozen]
        self.semantic_head = SemanticHead(widths, config.sem_dim, [t.share for t in config.teachers])
        self.semantic_decoder = SemanticDecoder(config.semantic_decoder, config.sem_dim, sum(widths), tokens)
        self.encoder = PixelEncoder(config.encoder, config.patch_size, grid, config.pix_dim)
        self.quantizer = HierarchicalQuantizer(
            config.num_codes, config.num_sub_codes, config.sem_dim, config.pix_dim, adaptive=config.adaptive
        )
        self.decoder = PixelDecoder(config.decoder, config.patch_size, grid, config.sem_dim + config.pix_dim)

    @property
    def device(self) -> torch.device:
        """Where the codebooks are."""
        return self.quantizer.semantic.codebook.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks, and of the images that `decode` returns."""
        return next(self.decoder.parameters()).dtype

    @property
    def vocabulary(self) -> Vocabulary:
        """The image ids, with the hash of the codebooks they belong to."""
        q = self.quantizer
        offsets = None if q.offsets is None else tuple(q.offsets.tolist())
        return Vocabulary(q.num_codes, q.num_sub_codes, codebook_hash=self.codebook_hash, offsets=offsets)

    @property
    def codebook_hash(self) -> str:
        """SHA-256 of both codebooks and, where they are adaptive, of the sizes; 64 hexadecimal digits."""
        q = self.quantizer
        return codebook_hash(q.semantic.codebook, q.pix_codebook, q.offsets)

    def semantic_features(self, images: Tensor) -> Tensor:
        """The frozen teachers' features of images, joined: [B, h, w, C]; ValueError without a teacher."""
        if self.teacher is None:
            raise ValueError("teacher: expected a tokenizer with its teacher, got one without it")
        features: Tensor = self.teacher(images)  # with one teacher its memory layout stays, on which sums depend
        more = [teacher(images) for teacher in self.more_teachers]
        return torch.cat([features, *more], dim=-1) if more else features

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Images -> ids [B, h, w].

        Args:
            images: a batch [B, 3, H, W] in [0, 1] of the tokenizer's size, of any float dtype, on its device; or what
                `processor` takes, which resizes and crops it: a path, a Pillow image, an array, a tensor [3, H, W] or
                of uint8, or a list of these.

        Raises:
            ValueError: what `check_images` or `processor` raises, or no teacher.
            OSError: a file cannot be read.
        """
        if not (isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()):
            images = self.processor(images).to(self.device)
        self.check_images(images)
        if images.shape[0] == 0:  # of which not every teacher knows the shape
            return images.new_zeros(0, self.config.grid_size, self.config.grid_size, dtype=torch.int64)
        z_sem = self.semantic_head(self.semantic_features(images))
        return self.quantizer(z_sem, self.encoder(images)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor, *, semantic_only: bool = False, output: str = "tensor") -> Any:
        """Ids [B, h, w] -> images [B, 3, H, W] in [0, 1], in the dtype of the networks.

        Args:
            codes: int64 ids.
            semantic_only: the mean of a sub-codebook replaces each of its sub-codes.
            output: "tensor", or "pil" for a list of Pillow images.

        Raises:
            ValueError: what `features` raises, or another output.
        """
        if output not in ("tensor", "pil"):
            raise ValueError(f"output: expected tensor or pil, got {output!r}")
        q = self.features(codes)
        q_pix = self.quantizer.group_means(codes) if semantic_only else q.pixel
        images = self.decode_features(q.semantic, q_pix).clamp(0, 1)
        return images if output == "tensor" else self.processor.to_pil(images)

    def decode_features(self, q_sem: Tensor, q_pix: Tensor) -> Tensor:
        """Quantised vectors [B, h, w, Ds], [B, h, w, Dp] -> images [B, 3, H, W], differentiable, not clamped."""
        return self.decoder(torch.cat([q_sem, q_pix], dim=-1))

    def reconstruct(self, images: Any) -> Tensor:
        """`decode(encode(images))`: [B, 3, H, W], or what `encode` takes besides, -> [B, 3, H, W]."""
        found: Tensor = self.decode(self.encode(images))
        return found

    def forward(self, images: Any) -> Tensor:
        """`reconstruct(images)`. Training works on the parts, as nothing passes a gradient here."""
        return self.reconstruct(images)

    @torch.no_grad()
    def features(self, codes: Tensor) -> Features:
        """Ids [B, h, w] -> their semantic and pixel code vectors.

        Under `torch.compile` and `torch.export` values are not checked: ids out of range give vectors of NaN.

        Raises:
            ValueError: another shape or dtype, or an id outside [0, K * m).
        """
        grid = self.config.grid_size
        if codes.ndim != 3 or codes.shape[1:] != (grid, grid):
            raise ValueError(f"codes: expected shape [B, {grid}, {grid}], got {list(codes.shape)}")
        if codes.dtype != torch.int64:
            raise ValueError(f"codes: expected int64, got {codes.dtype}")
        if not torch.compiler.is_compiling():
            Vocabulary(self.config.num_codes, self.config.num_sub_codes).check(codes)
        return Features(*self.quantizer.lookup(codes))

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless images are floating point [B, 3, H, W] of the tokenizer's size, in [0, 1].

        Values may leave the range by `ROUNDING`, half a step of 8 bits, which is rounding of resized images. They are
        checked on the CPU only: on a GPU a check would wait for the device, and a compiled graph has no values. There
        images outside the range give ids without meaning, and patches of NaN the id 0.
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            problem = f"expected shape [B, 3, {size}, {size}], got {list(images.shape)}"
            raise ValueError(f"images: {problem}; `processor` resizes images, or lists of images, of other sizes")
        if not images.is_floating_point():
            raise ValueError(f"images: expected floating point in [0, 1] (8-bit values / 255), got {images.dtype}")
        if images.device.type == "cpu" and images.numel() and not torch.compiler.is_compiling():
            check_range(images)

    def stored_state(self) -> dict[str, Tensor]:
        """The state dict, without the weights of teachers that come from elsewhere."""
        modules = {"teacher.": self.teacher, **{f"more_teachers.{n}.": t for n, t in enumerate(self.more_teachers)}}
        absent = tuple(prefix for prefix, t in modules.items() if isinstance(t, Teacher) and not t.stored)
        return {k: v for k, v in self.state_dict().items() if not k.startswith(absent)}

    def save_pretrained(self, directory: str | os.PathLike[str], *, state: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors into `directory`, each file atomically.

        Args:
            directory: created if it does not exist.
            state: `stored_state()` with whole tensors, where this process holds only shards of the weights.

        Raises:
            ValueError: the teacher's weights must be stored, and this tokenizer was loaded without them.
            OSError: the folder is not writable.
        """
        safetensors = require("safetensors.torch", "models")
        if self.teacher is None and not all(t.pretrained for t in self.config.teachers):
            raise ValueError("teacher: its weights belong to the checkpoint and are not loaded")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in (state or self.stored_state()).items()}
        # The weights go first: a folder with config.json is a complete checkpoint. Readers of safetensors expect "pt".
        write_atomic(folder / WEIGHTS_FILE, safetensors.save(state, metadata={"format": "pt"}))
        description = {"format": "semhitok", "version": FORMAT_VERSION, "codebook_sha256": self.codebook_hash}
        description["processor"] = self.processor.to_dict()
        write_json(folder / CONFIG_FILE, description | {"model": self.config.to_dict()})

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, teacher: bool = True, revision: str | None = None,
        device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> SemHiTok:  # fmt: skip
        """Load a checkpoint folder, a repository of the Hugging Face Hub, or a packaged tokenizer, in eval mode.

        Args:
            source: folder with config.json and model.safetensors, "owner/name", or the name of a tokenizer that comes
                with this package: "semhitok-toy".
            teacher: False loads a tokenizer that can decode, but not encode.
            revision: of the Hub repository.
            device: where the tokenizer goes; None is the CPU.
            dtype: of the networks; None is fp32.

        Raises:
            OSError: a file is missing or cannot be fetched.
            ValueError: a file is damaged or does not fit the others; the message names it.
        """
        safetensors = require("safetensors")
        require("safetensors.torch")
        folder = Path(source)
        if not folder.exists() and (PACKAGED / folder.name).is_dir() and folder.name == str(source):
            folder = PACKAGED / folder
        elif not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not folder.parent.exists():
            folder = _fetch(str(source), revision)
        config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        for path in (config_path, weights_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; is {source} a SemHiTok checkpoint?")
        try:
            description = parse_json(config_path.read_bytes())
            if not isinstance(description, dict) or description.get("format") != "semhitok":
                raise ValueError('expected "format": "semhitok"')
            if description.get("version") != FORMAT_VERSION:
                raise ValueError(f"expected version {FORMAT_VERSION}, got {description.get('version')!r}")
            config = SemHiTokConfig.from_dict(description.get("model", {}))
            # Checkpoints from before there was a processor were made with this one.
            processor = ImageProcessor.from_dict(description.get("processor", {"size": config.image_size}))
        except ValueError as error:
            raise ValueError(f"{config_path}: not a SemHiTok config: {error}") from error
        try:
            state = safetensors.torch.load_file(weights_path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{weights_path}: not a whole safetensors file: {error}") from error
        try:
            # Shapes are compared first on a model without memory: the config may ask for more than there is.
            _check_sizes(config, state)
            with torch.device("meta"):
                expected = {
                    k: v.shape for k, v in cls(config, teacher=teacher, load_teacher=False).stored_state().items()
                }
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{config_path}: not a SemHiTok config: {' '.join(str(error).split())}") from error
        if not teacher:
            state = {k: v for k, v in state.items() if not k.startswith(TEACHERS)}
        found = {k: v.shape for k, v in state.items()}
        for key in sorted(expected.keys() | found.keys()):
            if expected.get(key) != found.get(key):
                shapes = f"expected {_shape(expected.get(key))}, got {_shape(found.get(key))}"
                raise ValueError(f"{weights_path}: {key}: {shapes}")
        if processor.size != config.image_size:
            problem = f"processor.size: expected {config.image_size}, got {processor.size}"
            raise ValueError(f"{config_path}: not a SemHiTok config: {problem}")
        try:
            model = cls(config, teacher=teacher, load_teacher=[t.pretrained for t in config.teachers])
        except (ValueError, OSError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{config_path}: {error}") from error
        if config.adaptive:
            offsets = state["quantizer.offsets"]
            try:
                if offsets.dtype != torch.int64:
                    raise ValueError(f"offsets: expected int64, got {offsets.dtype}")
                check_offsets(offsets.tolist(), config.num_codes, config.vocabulary_size)
            except ValueError as error:
                raise ValueError(f"{weights_path}: quantizer.{error}") from None
        model.load_state_dict(state, strict=False)
        model.processor = processor
        if description.get("codebook_sha256") != model.codebook_hash:
            raise ValueError(f"{weights_path}: codebooks do not match codebook_sha256 of config.json")
        return model.eval().to(device=device, dtype=dtype)


def _check_sizes(config: SemHiTokConfig, state: dict[str, Tensor]) -> None:
    """Refuse sizes that the weights cannot have, before networks of such sizes are built."""
    weights = sum(value.numel() for value in state.values())
    for name, value in _integers(config.to_dict(), "model"):
        limit = len(state) if name.endswith("r.depth") else weights  # of the decoders and the encoder
        if value > limit:
            raise ValueError(f"{name}: expected at most {limit}, as {WEIGHTS_FILE} has no more, got {value}")


def _integers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """(dotted name, value) of all integers in a tree."""
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _integers(inner, f"{name}.{key}")


def _shape(shape: torch.Size | None) -> str:
    return "no such tensor" if shape is None else f"shape {list(shape)}"


def _fetch(name: str, revision: str | None) -> Path:
    """The folder of a checkpoint from the Hub, which is downloaded if it is not in the cache."""
    hub = require("huggingface_hub", "models")
    try:
        if not isinstance(hub.try_to_load_from_cache(name, CONFIG_FILE, revision=revision), str):
            # A wrong name, or no network, is said at once; a download would try again for half a minute.
            hub.HfApi().model_info(name, revision=revision, timeout=10)
        hub.hf_hub_download(name, WEIGHTS_FILE, revision=revision)
        return Path(hub.hf_hub_download(name, CONFIG_FILE, revision=revision)).parent
    except Exception as error:  # the client's errors share no base class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{name}: neither a checkpoint folder nor available from the Hub: {reason}") from error
