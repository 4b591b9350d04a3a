"""Presets, the tokenizer's contract, checkpoints, and the golden ids."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from small_tokenizers import adaptive_tokenizer, small_config

from semhitok.config import SemHiTokConfig, TeacherConfig, override, preset, preset_names, train_config
from semhitok.models.teacher import Teacher
from semhitok.tokenizer import SemHiTok


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return SemHiTok(small_config()).eval()


def images(count=3, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wavy_image(size=32):
    """A fixed image that no random number generator has a part in."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    channels = [((x * a + y * b + x * y * c) % 64) / 63 for a, b, c in ((3, 1, 0), (1, 5, 1), (7, 2, 3))]
    return torch.stack(channels)[None]


def set_fixed_weights(module):
    """Weights that follow from their shapes alone, whatever torch's generators do."""
    with torch.no_grad():
        for index, (_, tensor) in enumerate(sorted(module.state_dict().items())):
            if tensor.is_floating_point():
                n = torch.arange(tensor.numel(), dtype=torch.float64)
                values = torch.sin(n * 12.9898 + index * 78.233) * 43758.5453
                values = (values - values.floor() - 0.5) * (2 / max(1, tensor.shape[-1])) ** 0.5
                tensor.copy_(values.view_as(tensor))
        codebook = module.quantizer.semantic.codebook
        codebook.copy_(torch.nn.functional.normalize(codebook, dim=-1))
        module.semantic_head.std.fill_(1)


# Change these only with a reason that users of stored ids must hear of.
GOLDEN_IDS = [[[23, 6, 23, 23], [23, 20, 23, 23], [23, 23, 23, 6], [34, 9, 23, 20]]]
GOLDEN_HASH = "c582f5cd14989d812f7c93d8220030ed844a67760eed5e6ba03bb0f80d4acc97"


def test_golden_ids_of_a_fixed_image_with_fixed_weights():
    model = SemHiTok(small_config()).eval()
    set_fixed_weights(model)
    assert model.encode(wavy_image()).tolist() == GOLDEN_IDS
    assert model.codebook_hash == GOLDEN_HASH


def test_shapes_ranges_and_determinism(tokenizer):
    x = images()
    codes = tokenizer.encode(x)
    assert codes.shape == (3, 4, 4) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 36
    y = tokenizer.decode(codes)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    assert torch.equal(tokenizer.reconstruct(x), y)
    assert torch.equal(tokenizer.encode(x[1:2]), codes[1:2])
    features = tokenizer.features(codes)
    assert features.semantic.shape == (3, 4, 4, 6) and features.pixel.shape == (3, 4, 4, 5)
    assert torch.equal(features.semantic, tokenizer.quantizer.semantic.codebook[codes // 3])
    assert torch.equal(features.pixel, tokenizer.quantizer.pix_codebook.flatten(0, 1)[codes])


def test_semantic_only_decoding_ignores_the_sub_codes(tokenizer):
    codes = tokenizer.encode(images())
    other = codes // 3 * 3 + (codes + 1) % 3
    assert not torch.equal(tokenizer.decode(codes), tokenizer.decode(other))
    first, second = (tokenizer.decode(c, semantic_only=True) for c in (codes, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, tokenizer.decode(codes))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.rand(1, 3, 32, 31), r"images: expected shape \[B, 3, 32, 32\], got \[1, 3, 32, 31\]"),
        (torch.rand(1, 4, 32, 32), r"images: expected shape \[B, 3, 32, 32\], got \[1, 4, 32, 32\]"),
        (torch.rand(4, 32, 32), r"images: expected shape \[3, H, W\], got \[4, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), r"images\[0\]: expected uint8, or floating point .*int64"),
    ],
)
def test_bad_images(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 4, 3, dtype=torch.int64), r"codes: expected shape \[B, 4, 4\], got \[1, 4, 3\]"),
        (torch.zeros(1, 4, 4), "codes: expected int64, got torch.float32"),
        (torch.full((1, 4, 4), 36), r"codes: expected ids in \[0, 36\), got 36"),
        (torch.full((1, 4, 4), -1), r"codes: expected ids in \[0, 36\), got -1"),
    ],
)
def test_bad_codes(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(bad)


def test_a_tokenizer_with_adaptive_sizes_is_saved_and_loaded(tmp_path):
    tokenizer, x = adaptive_tokenizer(), images()
    sizes = tokenizer.quantizer.sizes
    assert sizes.sum() == 36 and len(sizes.unique()) > 2
    codes = tokenizer.encode(x)
    tokenizer.save_pretrained(tmp_path)
    loaded = SemHiTok.from_pretrained(tmp_path)
    assert torch.equal(loaded.quantizer.sizes, sizes) and loaded.vocabulary == tokenizer.vocabulary
    assert torch.equal(loaded.encode(x), codes) and torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    i, _ = loaded.vocabulary.split(codes)
    assert torch.equal(loaded.features(codes).semantic, loaded.quantizer.semantic.codebook[i])
    # Another sub-code of the same semantic code is another image, but not to its semantic part.
    other = loaded.vocabulary.flat(i, torch.zeros_like(i))
    first, second = (loaded.decode(c, semantic_only=True) for c in (codes, other))
    assert not torch.equal(codes, other) and torch.equal(first, second)
    # The sizes are part of the hash, and checked.
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for bad, message in (
        (sizes.flip(0).cumsum(0), "codebook_sha256"),
        (sizes.cumsum(0) * 0, "offsets: expected from 0"),
    ):
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), bad])
        safetensors.torch.save_file({**state, "quantizer.offsets": offsets}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            SemHiTok.from_pretrained(tmp_path)


def test_a_checkpoint_from_before_there_were_adaptive_sizes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"].pop("adaptive") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(SemHiTok.from_pretrained(tmp_path).encode(images()), tokenizer.encode(images()))


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "ck")
    assert sorted(p.name for p in (tmp_path / "ck").iterdir()) == ["config.json", "model.safetensors"]
    loaded = SemHiTok.from_pretrained(tmp_path / "ck")
    codes = tokenizer.encode(images())
    assert torch.equal(loaded.encode(images()), codes)
    assert not loaded.training and loaded.codebook_hash == tokenizer.codebook_hash
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ck" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    blind = SemHiTok.from_pretrained(tmp_path / "ck", teacher=False)
    assert torch.equal(blind.decode(codes), tokenizer.decode(codes))
    with pytest.raises(ValueError, match="teacher: expected a tokenizer with its teacher"):
        blind.encode(images())
    with pytest.raises(ValueError, match="teacher: its weights belong to the checkpoint"):
        blind.save_pretrained(tmp_path / "blind")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", lambda old: old[:-100], "not a whole safetensors file"),
        ("model.safetensors", lambda old: b"not weights\n" * 9, "not a whole safetensors file"),
        ("model.safetensors", None, "no such file"),
        ("config.json", lambda old: b"not json", "not a SemHiTok config"),
        ("config.json", lambda old: b"[1]", 'expected "format": "semhitok"'),
        ("config.json", lambda old: b"[" * 3000, r"config.json: not a SemHiTok config: .*nested too deep"),
    ],
)
def test_damaged_checkpoints(tokenizer, tmp_path, name, content, message):
    tokenizer.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content((tmp_path / name).read_bytes()))
    with pytest.raises((ValueError, OSError), match=message):
        SemHiTok.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_coeds", 3, "unknown key 'num_coeds'"),
        ("model.num_codes", "many", "num_codes: expected int, got 'many'"),
        ("model.num_codes", 13, "expected shape .*13"),
        ("model.patch_size", -8, "config.patch_size: expected at least 1, got -8"),
        ("model.teacher.name", "no_such_vit", "config.json: .*timm cannot build 'no_such_vit'"),
        ("model.teacher.options", {"depth": "two"}, "config.json: .*timm cannot build"),
        # what would take the machine's memory or hours to build is refused before
        ("model.num_codes", 2**40, r"config.num_codes: expected at most 1e\+09, got 1099511627776"),
        ("model.num_codes", 10**9, r"model.num_codes: expected at most \d+, as model.safetensors has no more"),
        ("model.encoder.depth", 10_000, r"config.encoder.depth: expected at most 1000, got 10000"),
        ("model.encoder.depth", 1000, r"model.encoder.depth: expected at most \d+, as"),
        ("model.teacher.options", {"depth": 2**31}, r"model.teacher.options.depth: expected at most \d+, as"),
        ("model.image_size", 8 * 1024, "shape"),
        ("model.encoder", {"width": 16, "depth": 1, "heads": 0}, "config.encoder.heads: expected at least 1, got 0"),
        (
            "model.encoder",
            {"width": 16, "depth": 1, "heads": 3},
            "config.json: .*width: expected a multiple of heads 3",
        ),
        ("version", 99, "expected version 1, got 99"),
        ("codebook_sha256", "0" * 64, "codebooks do not match codebook_sha256"),
    ],
)
def test_checkpoints_with_a_wrong_description(tokenizer, tmp_path, key, value, message):
    tokenizer.save_pretrained(tmp_path)
    place = description = json.loads((tmp_path / "config.json").read_text())
    *parents, name = key.split(".")
    for parent in parents:
        place = place[parent]
    place[name] = value
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        SemHiTok.from_pretrained(tmp_path)


def test_a_missing_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file; is .* a SemHiTok checkpoint"):
        SemHiTok.from_pretrained(tmp_path / "nothing" / "here")
    code = "from semhitok import SemHiTok; SemHiTok.from_pretrained('nobody/nothing')"
    env = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "FileNotFoundError: nobody/nothing: neither a checkpoint folder nor available" in done.stderr


def test_the_teacher_stays_frozen_whatever_the_parent_does(tokenizer):
    tokenizer.train()
    assert not tokenizer.teacher.training and not tokenizer.teacher.vit.training
    assert not any(p.requires_grad for p in tokenizer.teacher.parameters())
    assert not tokenizer.semantic_features(images()).requires_grad


def test_the_teacher_taps_the_last_but_one_block_unnormalised():
    config = small_config().teacher
    torch.manual_seed(0)
    teacher = Teacher(config, grid_size=4)
    x = images()
    vit = teacher.vit
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed((x - teacher.mean) / teacher.std))
        tokens = vit.blocks[0](tokens)[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(teacher(x).flatten(1, 2), tokens)


def test_the_teacher_is_resampled_to_the_grid():
    torch.manual_seed(0)
    teacher = Teacher(small_config().teacher, grid_size=3)
    assert teacher(images(size=48)).shape == (3, 3, 3, 24)


@pytest.mark.parametrize(
    ("name", "block", "options", "width"),
    [
        ("test_efficientnet", -1, {"output_stride": 16}, 64),
        ("test_resnet", -2, {}, 192),
        ("test_convnext", 1, {}, 32),
        ("vit_tiny_r_s16_p8_224", 3, {}, 192),
    ],
)
def test_the_teacher_can_be_any_network_with_feature_maps(name, block, options, width):
    """Convolutional networks and hybrids: the map of a stage or block, as timm gives it, on the tokenizer's grid."""
    torch.manual_seed(0)
    config = TeacherConfig(name, pretrained=False, image_size=64, block=block, options=options)
    teacher, x = Teacher(config, grid_size=4), images(size=64)
    with torch.no_grad():
        inputs = (x - teacher.mean) / teacher.std
        found = teacher.vit.forward_intermediates(inputs, norm=False, output_fmt="NCHW", intermediates_only=True)
        expected = torch.nn.functional.interpolate(found[block], (4, 4), mode="bilinear", antialias=True)
    assert teacher.width == width
    torch.testing.assert_close(teacher(x), expected.permute(0, 2, 3, 1))
    depth = len(found)
    with pytest.raises(ValueError, match=f"teacher.block: expected -{depth}..{depth - 1} for '{name}', got {depth}"):
        Teacher(replace(config, block=depth), grid_size=4)


def test_a_tokenizer_with_a_convolutional_teacher_is_saved_with_it(tmp_path):
    config = small_config()
    config.teacher = TeacherConfig("test_resnet", pretrained=False, image_size=32, block=-1)
    torch.manual_seed(0)
    tokenizer = SemHiTok(config).eval()
    tokenizer.save_pretrained(tmp_path)
    again, x = SemHiTok.from_pretrained(tmp_path), images()
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert torch.equal(again.semantic_features(x), tokenizer.semantic_features(x))


def test_a_convolutional_teacher_is_resampled_under_bf16_too():
    config = small_config()
    config.teacher = TeacherConfig("test_resnet", pretrained=False, image_size=32, block=-1)
    torch.manual_seed(0)
    teacher = Teacher(config.teacher, config.grid_size)
    expected = teacher(images())
    with torch.autocast("cpu", torch.bfloat16):
        got = teacher(images())
    assert got.dtype == torch.float32 and not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_a_tokenizer_saved_in_half_precision_is_the_rounded_one(tokenizer, tmp_path):
    half = copy.deepcopy(tokenizer).half()
    half.save_pretrained(tmp_path)
    loaded = SemHiTok.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encode(images()), half.float().encode(images()))
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    exact = {"quantizer.pix_codebook", "quantizer.semantic.codebook", "semantic_head.mean", "semantic_head.std"}
    assert {name for name, x in stored.items() if x.dtype == torch.float32} == exact
    assert {x.dtype for name, x in stored.items() if name not in exact} == {torch.float16}


def test_packaged_tokenizers_are_found_by_name(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("semhitok.tokenizer.PACKAGED", tmp_path / "packaged")
    tokenizer.save_pretrained(tmp_path / "packaged" / "some-toy")
    assert torch.equal(SemHiTok.from_pretrained("some-toy").encode(images()), tokenizer.encode(images()))
    monkeypatch.chdir(tmp_path / "packaged")  # a folder of that name goes first
    (tmp_path / "packaged" / "some-toy" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r'some-toy/config.json: .*expected "format": "semhitok"'):
        SemHiTok.from_pretrained("some-toy")
    for nothing in ("other-toy", "", ".", ".."):
        with pytest.raises(FileNotFoundError, match="no such file"):
            SemHiTok.from_pretrained(nothing)


# Parameters, teacher included, counted once when the presets were fixed: a change of size must be meant.
PARAMETERS = {
    "semhitok-tiny": 1_428_755,
    "semhitok-toy": 4_742_935,
    "semhitok-256": 719_424_755,
    "semhitok-256-one-gpu": 208_574_451,
    "semhitok-384": 830_251_363,
    "semhitok-256-24k": 719_424_755,
    "semhitok-384-24k": 830_251_363,
}


@pytest.mark.parametrize("name", preset_names())
def test_presets_build_on_the_meta_device(name):
    with torch.device("meta"):
        model = SemHiTok(preset(name), load_teacher=False)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    config = model.config
    assert config.vocabulary_size == (2048 if name == "semhitok-tiny" else 196_608)
    assert model.quantizer.pix_codebook.shape == (config.num_codes, config.num_sub_codes, config.pix_dim)
    assert SemHiTokConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_teacher_without_weights_says_so():
    code = (
        "from semhitok.config import preset; from semhitok.tokenizer import SemHiTok\n"
        "from semhitok.models.teacher import Teacher\n"
        "try: Teacher(preset('semhitok-256').teacher, 16)\n"
        "except OSError as error: print(error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "teacher: no weights for 'vit_large_patch16_siglip_256.webli'" in done.stdout, done.stderr


def test_overrides_set_fields_by_path_and_refuse_the_rest():
    config = train_config("semhitok-tiny")
    override(config, "pixel.optimizer.lr=1e-3")
    override(config, "pixel.steps=7")
    override(config, "data.crop_scale=[0.5, 1]")
    assert config.pixel.optimizer.lr == 1e-3 and config.pixel.steps == 7
    assert config.data.crop_scale == (0.5, 1.0)
    for bad, message in (
        ("pixel.stepps=7", "no such setting 'pixel.stepps'"),
        ("pixel.steps=many", "pixel.steps: expected int, got 'many'"),
        ("pixel.steps", "expected name=value"),
        ("nothing.at.all=1", "no such setting"),
        ("model.patch_size=7", "image_size: expected a multiple of patch_size 7, got 64"),
    ):
        with pytest.raises(ValueError, match=message):
            override(config, bad)
    with pytest.raises(ValueError, match="preset: expected one of"):
        preset("semhitok-huge")


def test_a_teacher_comes_from_a_hub_folder_or_a_file(tmp_path):
    """timm's hub loader, on a folder as the hub would give it; and a plain weights file."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    original = timm.create_model("test_vit", img_size=32, num_classes=0, global_pool="")
    timm.models.save_for_hf(original, tmp_path / "hub", safe_serialization=True)
    names = (f"local-dir:{tmp_path / 'hub'}", "test_vit")
    for name, file in zip(names, (None, str(tmp_path / "hub" / "model.safetensors")), strict=True):
        teacher = Teacher(TeacherConfig(name, checkpoint=file, image_size=32), 2)
        assert not teacher.stored
        for key, tensor in original.state_dict().items():
            assert torch.equal(teacher.vit.state_dict()[key], tensor), key
    with pytest.raises(OSError, match="teacher: no weights for 'test_vit'"):
        Teacher(TeacherConfig("test_vit", checkpoint=str(tmp_path / "none.safetensors"), image_size=32), 2)


DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_other_dtypes_keep_the_codebooks(tokenizer, dtype, adaptive):
    tokenizer = adaptive_tokenizer() if adaptive else tokenizer
    x, codes, digest = images(), tokenizer.encode(images()), tokenizer.codebook_hash
    pictures = tokenizer.decode(codes)
    books = {name: b.clone() for name, b in tokenizer.named_buffers()}
    for cast in (lambda model: model.to(dtype), lambda model: model.type(dtype)):
        model = cast(copy.deepcopy(tokenizer))
        assert {p.dtype for p in model.parameters()} == {dtype}
        for name, buffer in model.named_buffers():
            if not name.startswith("teacher.vit."):
                assert buffer.dtype == books[name].dtype and torch.equal(buffer, books[name]), name
        assert model.codebook_hash == digest and model.vocabulary == tokenizer.vocabulary
        for given in (x, x.to(dtype)):
            found = model.encode(given)
            assert found.shape == codes.shape and (found == codes).float().mean() > 0.9
        decoded = model.decode(codes)
        assert decoded.dtype == dtype and (decoded - pictures).abs().max() < 0.05
        assert model.decode(codes, semantic_only=True).dtype == dtype
        assert model.features(codes).pixel.dtype == torch.float32
    if dtype == torch.float64:
        assert torch.equal(found, codes)


def test_methods_cast_as_to_does_and_a_cast_tokenizer_is_saved(tokenizer, tmp_path):
    codes = tokenizer.encode(images())
    for name in ("half", "bfloat16", "double"):
        model = getattr(copy.deepcopy(tokenizer), name)()
        assert model.quantizer.pix_codebook.dtype == model.quantizer.semantic.codebook.dtype == torch.float32
        assert model.encode(images()).shape == codes.shape
    model.save_pretrained(tmp_path)
    loaded = SemHiTok.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images()), codes)
    assert loaded.half().decode(codes).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_empty_batch_gives_an_empty_one(tokenizer, dtype):
    tokenizer.to(dtype)
    codes = tokenizer.encode(images()[:0])
    assert codes.shape == (0, 4, 4) and codes.dtype == torch.int64
    for semantic_only in (False, True):
        decoded = tokenizer.decode(codes, semantic_only=semantic_only)
        assert decoded.shape == (0, 3, 32, 32) and decoded.dtype == dtype
    assert tokenizer.reconstruct(images()[:0]).shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match="images: expected shape"):
        tokenizer.encode(torch.zeros(0, 3, 31, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"images: expected values in \[0, 1\], got values from 0\.\d+ to 25\d"),
        (lambda x: x * 2 - 1, r"images: expected values in \[0, 1\], got values from -0\.99\d* to 0\.99"),
        (lambda x: x.index_fill(3, torch.tensor(5), torch.nan), r"images: expected values in \[0, 1\], got NaN"),
        (lambda x: x.index_fill(3, torch.tensor(5), torch.inf), r"images: expected values in \[0, 1\], .* to inf"),
        (lambda x: x.index_fill(3, torch.tensor(5), 1.004), r"images: expected values in \[0, 1\], .* to 1.004"),
    ],
)
def test_images_outside_the_range_are_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(change(images()))


def test_rounding_at_the_ends_of_the_range_is_no_error(tokenizer):
    x = images()
    assert torch.equal(tokenizer.encode(x * (1 + 1e-7)), tokenizer.encode(x))
    tokenizer.encode((x * 2 - 0.5).clamp(-1e-3, 1.001))


class Calls(torch.nn.Module):
    """A module whose forward pass is a method of a tokenizer."""

    def __init__(self, tokenizer, method):
        super().__init__()
        self.tokenizer, self.method = tokenizer, method

    def forward(self, x):
        return getattr(self.tokenizer, self.method)(x)


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_both_ways_compile_whole_and_export(tokenizer, method, adaptive):
    tokenizer = adaptive_tokenizer() if adaptive else tokenizer
    x = images() if method == "encode" else tokenizer.encode(images())
    expected = getattr(tokenizer, method)(x)
    compiled = torch.compile(getattr(tokenizer, method), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(Calls(tokenizer, method), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(exported.module()(x[:2]), expected[:2])


def test_compiled_decoding_marks_ids_out_of_range_with_nan(tokenizer):
    decode = torch.compile(tokenizer.decode, fullgraph=True, backend="eager")
    assert decode(torch.full((1, 4, 4), 36)).isnan().all()


@pytest.mark.parametrize("network", ["vision transformer", "convolutional"])
def test_weights_that_accelerate_offloads(tokenizer, network):
    accelerate = pytest.importorskip("accelerate")
    if network == "convolutional":
        tokenizer = SemHiTok(small_config(teacher=TeacherConfig("resnet18", pretrained=False, image_size=32))).eval()
    x, codes = images(), tokenizer.encode(images())
    pictures = tokenizer.decode(codes)
    offloaded = accelerate.cpu_offload(copy.deepcopy(tokenizer), execution_device="cpu")
    assert all(p.is_meta for p in offloaded.parameters())
    for _ in range(2):
        assert torch.equal(offloaded.encode(x), codes) and torch.equal(offloaded.decode(codes), pictures)
    assert all(p.is_meta for p in offloaded.parameters())
    with_buffers = accelerate.cpu_offload(copy.deepcopy(tokenizer), execution_device="cpu", offload_buffers=True)
    with pytest.raises(RuntimeError, match=r"codebook: expected device cpu \(that of z_sem\), got meta"):
        with_buffers.encode(x)


def test_copies_and_pickles_of_a_tokenizer_are_independent(tokenizer):
    codes = tokenizer.encode(images())
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        for parameter in tokenizer.teacher.parameters():
            parameter.data.add_(1)
        assert torch.equal(other.encode(images()), codes)
        for parameter in tokenizer.teacher.parameters():
            parameter.data.sub_(1)
