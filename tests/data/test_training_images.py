"""The images of a training run: the same ones for any number of processes and workers, stopped or not."""

import functools
import hashlib
import http.server
import io
import itertools
import multiprocessing
import os
import signal
import socketserver
import tarfile
import threading

import pytest
import torch

from semhitok.config import DataConfig
from semhitok.data import shards as shards_module
from semhitok.data.crops import RandomCrops, crop
from semhitok.data.images import list_images, read_image, resize_crop, save_png, to_uint8
from semhitok.data.stream import generator
from semhitok.data.training_images import HeldOutBatches, TrainingImages

WHOLE = DataConfig(crop_scale=(1.0, 1.0), flip=False, shuffle_buffer=3)  # a crop tells which image it is of


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six smooth coloured pictures of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for n in range(6):
        coarse = torch.rand(1, 3, 5, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (48 + 4 * n, 70), mode="bicubic")
        save_png(image[0].clamp(0, 1), folder / f"{n}.png")
    return folder


@functools.cache
def png(grey):
    """A PNG of 8 x 8 pixels of one grey, which `greys` finds again."""
    pil = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    pil.new("RGB", (8, 8), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def greys(images):
    return images[:, 0, 4, 4].mul(255).round().int().tolist()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def grey_members(first, count):
    """Samples of a text and an image each."""
    for n in range(first, first + count):
        yield f"{n:03}.json", b"{}"
        yield f"{n:03}.png", png(n)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight shards of 3 to 6 images, 36 in all, each of another grey: 0 to 35."""
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for n in range(8):
        count = 3 + n % 4
        write_tar(folder / f"train-{n:03}.tar", grey_members(first, count))
        first += count
    return str(folder / "train-{000..007}.tar")


def steps(batches, count):
    """`count` batches, then the workers are ended: a list of [b, 3, size, size] for each."""
    got = [torch.cat([micro.images for micro in next(batches)]) for _ in range(count)]
    batches.close()
    return got


# ------------------------------------------------------------------------------------------------
# Crops


def test_crops_are_what_they_always_were(tmp_path):
    """Figures in the documentation come from runs that others can repeat only with the same crops."""
    y, x = torch.arange(37.0)[:, None], torch.arange(53.0)[None]
    for n in range(2):
        image = torch.stack([(3 * y + 5 * x + 40 * n) % 256, (7 * y + x) % 256, (2 * x + 11 * y * n) % 256])
        save_png(image / 255, tmp_path / f"{n}.png")
    paths = list_images([tmp_path])

    def pixels(size, scale):
        data = RandomCrops(paths, size, DataConfig(crop_scale=scale), 3)
        return torch.stack([data[n] for n in range(6)])

    # Not resized, so the same bytes on every machine.
    cut = pixels(16, None)
    digest = hashlib.sha256(cut.numpy().tobytes()).hexdigest()
    assert digest == "c8ab00c4175ddf091dd30cf4785c05551f2f983d5d52535785bdede6b700b219"
    resized = pixels(16, (0.5, 1.0))[:, :, 3, 5] * 255
    expected = [
        [135.731842, 82.756302, 135.695450], [175.731857, 98.756279, 58.365879],
        [149.160400, 123.713539, 42.061375], [211.667801, 113.304283, 189.591019],
        [213.540130, 143.379639, 66.540123], [5.301107, 104.539558, 181.619751],
    ]  # fmt: skip
    torch.testing.assert_close(resized, torch.tensor(expected), atol=1e-3, rtol=0)
    enlarged = pixels(64, None).double().mean((1, 2, 3))
    expected = [0.511962, 0.426247, 0.426247, 0.511962, 0.426247, 0.511962]
    torch.testing.assert_close(enlarged, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_crops_are_a_function_of_seed_and_number(pictures):
    paths = sorted(pictures.iterdir())
    config = DataConfig(crop_scale=(0.5, 1.0))
    first, second = RandomCrops(paths, 24, config, 3), RandomCrops(paths, 24, config, 3)
    order = [11, 2, 40, 0]
    crops = {n: first[n] for n in order}
    for n in sorted(order):
        assert torch.equal(second[n], crops[n])
        assert crops[n].shape == (3, 24, 24) and 0 <= crops[n].min() <= crops[n].max() <= 1
    other = RandomCrops(paths, 24, config, 4)
    assert not torch.equal(other[11], crops[11])


def test_every_epoch_sees_each_image_once(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    data = RandomCrops(list_images([tmp_path]), 8, WHOLE, 0)
    seen = greys(torch.stack([data[n] for n in range(18)]))
    assert [sorted(seen[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
    assert seen[:6] != seen[6:12] or seen[6:12] != seen[12:]


def test_unreadable_training_images_are_skipped_with_the_reason(pictures, tmp_path):
    good = sorted(pictures.iterdir())[0]
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    data = RandomCrops([bad, good], 16, DataConfig(), 0)
    samples = [data.sample(n) for n in range(4)]
    assert torch.stack([sample.crop for sample in samples]).shape == (4, 3, 16, 16)
    problems = [problem for sample in samples for problem in sample.skipped]
    assert problems == [f"{bad}: not an image of a known format, but text"]  # a process says it once
    with pytest.raises(ValueError, match=r"none of the 1 images can be read; the first: .*bad\.png: not an"):
        RandomCrops([bad], 16, DataConfig(), 0)[0]


def test_links_to_nothing_are_named_and_skipped(pictures, tmp_path, capsys):
    for name in ("nothing", "loop.png"):
        (tmp_path / "loop.png" if name == "loop.png" else tmp_path / "broken.png").symlink_to(name)
    (tmp_path / "good.png").symlink_to(pictures / "0.png")
    images = TrainingImages([tmp_path], 8, WHOLE, 0)
    assert len(next(images.batches(3, 3))[0].images) == 3
    err = capsys.readouterr().err
    assert "broken.png" in err and "loop.png" in err


def test_small_images_are_enlarged_to_a_crop(tmp_path):
    save_png(torch.full((3, 1, 1), 0.5), tmp_path / "dot.png")
    data = RandomCrops([tmp_path / "dot.png"], 16, DataConfig(crop_scale=None), 0)
    assert (data[0] - 0.5).abs().max() < 0.01


# ------------------------------------------------------------------------------------------------
# Fixed crops

FIXED = DataConfig(crop_scale=None, fixed=True)


def by_number(paths, size):
    """All fixed crops, made by hand."""
    plain = torch.stack([resize_crop(read_image(path), size) for path in paths])
    return torch.cat([plain, plain.flip(-1)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_fixed_crops_are_those_of_evaluation_under_their_numbers(pictures, workers, flip):
    config = DataConfig(crop_scale=None, fixed=True, flip=flip, workers=workers)
    data = TrainingImages([pictures], 24, config, 3)
    expected = by_number(list_images([pictures]), 24)
    assert data.fixed_count == (12 if flip else 6)
    seen = []
    for images in (data, data.other(0x5EED)):
        batches = images.batches(6, 3)
        for _ in range(12):
            parts = next(batches)
            numbers = torch.cat([part.crops for part in parts])
            assert torch.equal(torch.cat([part.images for part in parts]), expected[numbers])
            assert sorted((numbers % 6).tolist()) == list(range(6))  # every image once an epoch
            seen += numbers.tolist()
        batches.close()
    assert set(seen) == set(range(data.fixed_count))
    assert parts[0].to(torch.device("cpu"), (1,)).crops is parts[0].crops


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (3, 2)])
def test_all_fixed_crops_in_equal_batches_whatever_the_processes(pictures, processes, workers):
    config = DataConfig(crop_scale=None, fixed=True, workers=workers)
    expected = by_number(list_images([pictures]), 24)
    ranks = [TrainingImages([pictures], 24, config, 3, rank=r, world_size=processes) for r in range(processes)]
    rounds = list(zip(*(data.fixed_batches(5) for data in ranks), strict=True))
    batches = [batch for round_ in rounds for batch in round_]
    numbers = torch.cat([batch.crops for batch in batches]).tolist()
    assert numbers[:12] == list(range(12)) and set(numbers[12:]) == {11}
    assert len(rounds) == -(-12 // (5 * processes))
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected[torch.tensor(numbers)])


def test_the_number_of_a_replaced_crop_is_that_of_its_replacement(pictures, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    good = list_images([pictures])[:2]
    data = RandomCrops([tmp_path / "bad.png", *good], 16, FIXED, 0)
    samples = [data.sample(n) for n in range(9)]
    assert {sample.number % 3 for sample in samples} == {1, 2}
    assert sorted(sample.number % 3 for sample in samples) == [1] * 6 + [2] * 3  # the first good one takes the place
    assert [len(sample.skipped) for sample in samples].count(1) == 1
    expected = by_number([good[0], *good], 16)
    assert all(torch.equal(sample.crop, expected[sample.number]) for sample in samples)


def test_fixed_crops_need_files_and_no_scale(pictures, shards):
    with pytest.raises(ValueError, match=r"crop_scale: expected null with fixed crops, got \[0.6, 1.0\]"):
        TrainingImages([pictures], 16, DataConfig(fixed=True), 0)
    with pytest.raises(ValueError, match="fixed: expected image files, got shards"):
        TrainingImages([shards], 16, FIXED, 0)
    (batch,) = next(TrainingImages([pictures], 16, DataConfig(), 0).batches(2, 2))
    assert batch.crops is None


# ------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("processes, workers, micro", [(1, 0, 8), (1, 2, 2), (2, 0, 4), (2, 2, 2), (4, 0, 1)])
def test_files_give_the_same_crops_to_any_number_of_processes(pictures, processes, workers, micro):
    config = DataConfig(workers=workers)
    alone = RandomCrops(list_images([pictures]), 16, config, 5)
    for rank in range(processes):
        data = TrainingImages([pictures], 16, config, 5, rank=rank, world_size=processes)
        batches = data.batches(8, micro, step=3)
        firsts = []
        for step in (3, 4):
            for part in next(batches):
                firsts.append(part.first)
                assert part.total == 8 and part.images.shape == (micro, 3, 16, 16)
                expected = [alone[8 * step + part.first + n] for n in range(micro)]
                assert torch.equal(part.images, torch.stack(expected))
        batches.close()
        share = 8 // processes
        assert firsts == list(range(rank * share, (rank + 1) * share, micro)) * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_replaced_files_are_counted_once_over_a_stop(pictures, tmp_path, workers, capfd):
    (tmp_path / "bad.png").write_text("no image")
    config = DataConfig(workers=workers)
    data = TrainingImages([tmp_path / "bad.png", *list_images([pictures])[:3]], 16, config, 0)
    batches = data.batches(8, 4)
    next(batches)
    position = batches.position()
    batches.close()
    assert len(data.skipped) == 1  # two epochs of four images
    steps(data.other(1).batches(8, 4), 1)
    assert len(data.skipped) == 1
    assert capfd.readouterr().err.count("bad.png") == 1  # whoever reads, and however often
    resumed = TrainingImages([tmp_path / "bad.png", *list_images([pictures])[:3]], 16, config, 0)
    going_on = resumed.batches(8, 4, 1, position)
    assert len(resumed.skipped) == 1
    got = steps(going_on, 2)
    assert len(resumed.skipped) == 1 and "bad.png" not in capfd.readouterr().err
    assert torch.equal(torch.stack(got), torch.stack(steps(data.batches(8, 4), 3)[1:]))


def test_other_is_another_order_of_the_same(pictures):
    data = TrainingImages([pictures], 16, DataConfig(), 7)
    other = data.other(0x5EED)
    expected = RandomCrops(list_images([pictures]), 16, DataConfig(), 7 ^ 0x5EED)
    (got,) = steps(other.batches(6, 6), 1)
    assert torch.equal(got, torch.stack([expected[n] for n in range(6)]))
    assert other.description == data.description
    (own,) = steps(data.batches(6, 6), 1)
    assert not torch.equal(own, got)


def test_the_description_tells_data_apart(pictures, shards, tmp_path):
    def description(*sources):
        return TrainingImages(sources, 16, DataConfig(), 0).description

    files = description(pictures)
    names = "\n".join(f"{p.name} {p.stat().st_size}" for p in list_images([pictures]))
    assert files == {"images": 6, "images_sha256": hashlib.sha256(names.encode()).hexdigest()}
    tars = description(shards)
    assert tars["shards"] == 8 and tars == description(*shards_module.expand_shards(shards))
    assert tars != description(shards.replace("000..007", "001..007"))


@pytest.mark.parametrize("batch, micro, processes", [(6, 4, 1), (8, 4, 4), (0, 1, 1), (4, 0, 1)])
def test_a_batch_must_divide(pictures, batch, micro, processes):
    data = TrainingImages([pictures], 16, DataConfig(), 0, world_size=processes)
    with pytest.raises(ValueError, match=f"batch_size: expected a multiple .* {processes} x {micro}, got {batch}"):
        data.batches(batch, micro)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_readable_file_is_one_clear_error(tmp_path, workers):
    (tmp_path / "bad.png").write_text("no image")
    batches = TrainingImages([tmp_path], 16, DataConfig(workers=workers), 0).batches(2, 1)
    with pytest.raises(ValueError, match=r"^none of the 1 images can be read; the first: .*bad\.png: not an image"):
        next(batches)
    assert not multiprocessing.active_children() and not list(batches)


def test_reading_leaves_the_random_numbers_of_training_alone(pictures, shards):
    before = torch.get_rng_state()
    for source, workers in itertools.product((pictures, shards), (0, 1)):
        steps(TrainingImages([source], 8, DataConfig(workers=workers), 0).batches(2, 2), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_all_and_end_with_close(pictures, number):
    before = set(multiprocessing.active_children())
    batches = TrainingImages([pictures], 16, DataConfig(workers=2), 0).batches(2, 1)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, number)
    for _ in range(5):
        next(batches)
    batches.close()
    assert not workers & set(multiprocessing.active_children())


# ------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_every_image_once_an_epoch(shards, processes, workers):
    """A stream's epoch ends where its place says so, after which it begins with another share."""
    config = DataConfig(**{**vars(WHOLE), "workers": workers})
    epochs = {0: [], 1: []}
    for rank in range(processes):
        data = TrainingImages([shards], 8, config, 1, rank=rank, world_size=processes)
        batches = data.batches(processes, 1)
        count = max(1, workers)
        for number in itertools.count():
            (part,) = next(batches)
            places = batches.position()["streams"]
            if min(place["epoch"] for place in places) == 2:
                break
            epoch = places[number % count]["epoch"]
            if epoch < 2:
                epochs[epoch] += greys(part.images)
        batches.close()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(36))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(36))


@pytest.mark.parametrize("processes, rank, workers", [(1, 0, 0), (1, 0, 2), (2, 1, 2)])
def test_shards_go_on_bit_for_bit(shards, tmp_path, processes, rank, workers):
    """From every position, through a file, over borders of blocks, shards and epochs."""
    config = DataConfig(workers=workers, shuffle_buffer=4)
    data = TrainingImages([shards], 8, config, 1, rank=rank, world_size=processes)
    # three micro-batches a step, so that the worker whose turn it is changes
    batches = data.batches(6 * processes, 2)
    whole, positions = [], [None]
    for _ in range(14):
        whole.append(torch.cat([micro.images for micro in next(batches)]))
        torch.save(batches.position(), tmp_path / "position.pt")
        positions.append(torch.load(tmp_path / "position.pt", weights_only=True))
    batches.close()
    assert max(place["epoch"] for place in positions[-1]["streams"]) > 0
    every = range(len(whole)) if workers == 0 else (0, 1, 2, 7, 12)
    for step in every:
        kept = repr(positions[step])
        got = steps(data.batches(6 * processes, 2, step, positions[step]), min(3, len(whole) - step))
        assert torch.equal(torch.cat(got), torch.cat(whole[step : step + 3]))
        assert repr(positions[step]) == kept
    assert positions[0] is None and not torch.equal(whole[0], whole[1])


def test_an_old_position_of_shards_gives_the_images_it_always_gave(shards):
    """Positions in run folders stay readable, and the same seed keeps its order."""
    place = {"epoch": 1, "shard": 0, "offset": 0, "block": 0, "inside": 3, "number": 22, "images": 3}
    position = {"data": "shards", "processes": 1, "rank": 0, "workers": 2, "skipped": 0, "turn": 1}
    position["streams"] = [place, {**place, "number": 20}]
    data = TrainingImages([shards], 8, DataConfig(**{**vars(WHOLE), "workers": 2}), 1)
    batches = data.batches(6, 2)
    seen = [greys(torch.cat([micro.images for micro in next(batches)])) for _ in range(7)]
    assert seen[0] == [32, 31, 23, 22, 30, 34]
    now = {**position, "skipped": []}  # once a number
    assert batches.position() == now and list(batches.position()) == list(position)
    batches.close()
    got = [greys(images) for images in steps(data.batches(6, 2, 7, position), 2)]
    assert got == [[10, 21, 13, 12, 11, 23], [14, 15, 22, 24, 17, 16]]


def test_crops_of_shards_differ_by_seed_and_epoch(shards):
    config = DataConfig(shuffle_buffer=100)
    one, again, other = (
        torch.cat(steps(TrainingImages([shards], 8, config, seed).batches(36, 36), 2)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert greys(one[:36]) != greys(one[36:]) and greys(one[:36]) != greys(other[:36])


def test_crops_of_shards_follow_from_the_count_of_images(pictures, tmp_path):
    """One picture again and again: every time another crop, which a stop does not change."""
    pytest.importorskip("webdataset")
    picture = list_images([pictures])[0]
    path = write_tar(tmp_path / "a.tar", [("a.png", picture.read_bytes())])
    data = TrainingImages([path], 16, DataConfig(), 3)
    batches = data.batches(2, 2)
    first = torch.cat([micro.images for micro in next(batches)])
    going_on = data.batches(2, 2, 1, batches.position())
    got = torch.cat([first, *steps(going_on, 1)])
    for number, image in enumerate(got):
        draws = torch.rand(4, generator=generator(3, 0, number)).tolist()
        assert torch.equal(image, crop(to_uint8(read_image(picture)), 16, DataConfig(), draws))
    assert len({image.sum().item() for image in got}) == 4


def bad_members():
    yield from grey_members(0, 2)
    yield "text.txt", b"a caption without its image"
    yield "broken.png", png(9)[:40]
    yield "two.mask.png", png(200)
    yield "two.png", png(2)
    yield "__meta__/x.png", png(201)
    yield "._hidden.png", png(202)
    yield "evil.pyd", b"cos\nsystem\n(S'touch owned'\ntR."
    yield "evil.JPG", png(3)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_named_counted_and_left_out(tmp_path, workers, capfd):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "a.tar", bad_members())
    config = DataConfig(**{**vars(WHOLE), "workers": workers})
    data = TrainingImages([tmp_path / "a.tar"], 8, config, 0)
    batches = data.batches(2, 2)
    seen = []
    for step in range(6):
        if step == 3:  # going on neither forgets nor counts twice
            position = batches.position()
            batches.close()
            batches = data.batches(2, 2, step, position)
        (part,) = next(batches)
        seen += greys(part.images)
        assert len(batches.skipped) == len(position["skipped"]) if step == 3 else True
    batches.close()
    assert [sorted(seen[n : n + 4]) for n in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    err = capfd.readouterr().err
    assert len(data.skipped) == err.count("skipped: ") == 2
    assert f"{tmp_path}/a.tar: text: no image among txt" in err
    assert f"{tmp_path}/a.tar: broken: not an image of a known format" in err


def damage_cut_in_an_image(path):
    path.write_bytes(path.read_bytes()[: 512 * 2 * 7 + 512 + 40])  # sample 3's text and image header


def damage_cut_between_members(path):
    path.write_bytes(path.read_bytes()[: 512 * 4 * 3])


def damage_header(path):
    data = bytearray(path.read_bytes())
    data[512 * 4 * 3 + 10] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_cut_in_an_image, damage_cut_between_members, damage_header])
def test_a_damaged_shard_gives_what_comes_before_the_damage(tmp_path, damage, capfd, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setattr(shards_module, "PAUSE", 100)  # what is damaged is not tried again
    assert len(png(0)) <= 512  # members of a header and a block each
    damage(write_tar(tmp_path / "a.tar", grey_members(0, 6)))
    write_tar(tmp_path / "b.tar", grey_members(10, 2))
    batches = TrainingImages([tmp_path / "a.tar", tmp_path / "b.tar"], 8, WHOLE, 0).batches(5, 5)
    got = [sorted(greys(images)) for images in steps(batches, 3)]
    assert got == [[0, 1, 2, 10, 11]] * 3
    assert len(batches.skipped) == 1
    assert capfd.readouterr().err.count("a.tar: cannot read the shard after 3 samples") == 1


@pytest.mark.parametrize("suffix, mode", [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.bz2", "w:bz2")])
def test_compressed_shards(tmp_path, suffix, mode):
    pytest.importorskip("webdataset")
    path = write_tar(tmp_path / f"a.{suffix}", grey_members(0, 4), mode)
    assert sorted(greys(*steps(TrainingImages([path], 8, WHOLE, 0).batches(4, 4), 1))) == [0, 1, 2, 3]
    path.write_bytes(path.read_bytes()[:-30])
    batches = TrainingImages([path, write_tar(tmp_path / "b.tar", grey_members(9, 1))], 8, WHOLE, 0).batches(1, 1)
    steps(batches, 12)
    assert len(batches.skipped) > 0


def test_a_folder_of_shards_stands_for_them_and_what_else_there_is_is_named(shards, tmp_path, capfd):
    folder = tmp_path / "data"
    (folder / "part").mkdir(parents=True)
    write_tar(folder / "0.tar", [("a.png", png(10)), ("README", b"x"), ("link.png", b"")])
    write_tar(folder / "part" / "1.tar", [("b.png", png(20)), ("b.mask.png", png(99))])
    (folder / "notes.md").write_text("notes")
    images = TrainingImages([folder], 8, WHOLE, 0)
    assert images.shards == [str(folder / "0.tar"), str(folder / "part" / "1.tar")]
    assert "data: passed over 1 file: 1 of another kind (notes.md)" in capfd.readouterr().err
    batches = images.batches(2, 2)
    assert [sorted(greys(next(batches)[0].images)) for _ in range(3)] == [[10, 20]] * 3
    err = capfd.readouterr().err
    assert err.count("0.tar: passed over 1 file: 1 of no image format (README)") == 1
    assert err.count("1.tar: passed over 1 file: 1 more images of samples (b.mask.png)") == 1
    (folder / "photo.png").write_bytes(png(30))
    assert [path.name for path in TrainingImages([folder], 8, WHOLE, 0).paths] == ["photo.png"]
    assert "0.tar" in capfd.readouterr().err
    with pytest.raises(
        ValueError, match=r"expected images, folders or webdataset shards, got the parquet file a\.parquet"
    ):
        TrainingImages(["a.parquet"], 8, WHOLE, 0)
    assert TrainingImages([folder / "photo.png"], 8, WHOLE, 0, rank=1, world_size=2).paths


def test_a_name_that_comes_again_is_another_sample(tmp_path):
    pytest.importorskip("webdataset")
    path = write_tar(tmp_path / "a.tar", [("x.png", png(1)), ("x.png", png(2)), ("y.txt", b""), ("y.png", png(3))])
    assert [greys(s.image()[None])[0] for s in shards_module.read_shard(str(path))] == [1, 2, 3]


def test_a_shard_is_read_from_any_of_its_samples_on(tmp_path):
    """Its damage counts as the last one."""
    pytest.importorskip("webdataset")
    path = write_tar(tmp_path / "a.tar", grey_members(0, 6))
    damage_header(path)
    keys = [[sample.key for sample in shards_module.read_shard(str(path), skip)] for skip in range(5)]
    assert keys == [["000", "001", "002", ""], ["001", "002", ""], ["002", ""], [""], []]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_without_images_is_an_error(tmp_path, workers):
    pytest.importorskip("webdataset")
    paths = [write_tar(tmp_path / "a.tar", [("a.txt", b"")]), write_tar(tmp_path / "b.tar", [])]
    batches = TrainingImages(paths, 8, DataConfig(workers=workers), 0).batches(2, 1)
    with pytest.raises(
        ValueError, match=r"^data: expected a sample that can be used, got none in 10 epochs of shards .*: no image"
    ):
        next(batches)


def test_an_epoch_without_images_after_a_good_one_is_an_error(tmp_path):
    pytest.importorskip("webdataset")
    path = write_tar(tmp_path / "a.tar", grey_members(0, 2))
    batches = TrainingImages([path], 8, DataConfig(), 0).batches(2, 2)
    next(batches)
    write_tar(path, [("a.txt", b"")])
    with pytest.raises(ValueError, match=r"got none in 10 epochs of shards .*; the first: .*a: no image among txt"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_whose_shards_are_all_bad_gets_others_in_the_next_epoch(tmp_path, workers, capfd):
    """Which shards a reader has changes from epoch to epoch: two bad ones of three do not end the run."""
    pytest.importorskip("webdataset")
    good = write_tar(tmp_path / "good.tar", grey_members(0, 3))
    bad = [tmp_path / f"{n}.tar" for n in range(3)]
    for path in bad:
        path.write_bytes(b"no archive" * 100)
    data = TrainingImages([good, *bad], 8, DataConfig(**{**vars(WHOLE), "workers": workers}), 0)
    batches = data.batches(2, 1)
    assert {grey for _ in range(12) for micro in next(batches) for grey in greys(micro.images)} == {0, 1, 2}
    batches.close()
    assert len(data.skipped) == capfd.readouterr().err.count("cannot read the shard after 0 samples") == 3


def test_what_shards_cannot_do_is_said_before_training(shards, pictures, tmp_path):
    def make(*sources, processes=1, workers=0, **settings):
        return TrainingImages(sources, 8, DataConfig(workers=workers, **settings), 0, world_size=processes)

    with pytest.raises(ValueError, match=r"at least 12 shards, .* 4 processes x 3 workers, got 8: use fewer"):
        make(shards, processes=4, workers=3)
    with pytest.raises(ValueError, match="expected either image files or shards"):
        make(shards, pictures)
    with pytest.raises(FileNotFoundError, match=r"train-008\.tar: no such shard"):
        make(shards.replace("007", "008"))
    with pytest.raises(FileNotFoundError, match=r"gone\.tar: no such shard"):
        make(f"file:{tmp_path}/gone.tar")
    with pytest.raises(ValueError, match=r"s3://bucket/a\.tar: expected a local shard or one of .*https.*, got s3"):
        make("s3://bucket/a.tar")
    with pytest.raises(ValueError, match="shuffle_buffer: expected at least 1, got 0"):
        make(shards, shuffle_buffer=0)
    assert make(shards.replace("{000..007}", "00{1,3}")).description["shards"] == 2
    assert make(f"file://{shards}").description == make(shards).description


def test_shards_go_on_only_as_they_were_begun(shards, pictures):
    def make(source=shards, processes=1, rank=0, workers=0):
        return TrainingImages([source], 8, DataConfig(workers=workers), 0, rank=rank, world_size=processes)

    position = make().batches(2, 1).position()
    for other, words in (
        (make(processes=2), "processes: expected 2, got 1"),
        (make(workers=2), "workers: expected 2, got 0"),
    ):
        with pytest.raises(ValueError, match=f"position: {words}; a run resumes only as it began"):
            other.batches(2, 1, 1, position)
    second = make(processes=2, rank=1).batches(2, 1).position()
    with pytest.raises(ValueError, match="position: rank: expected 0, got 1"):
        make(processes=2).batches(2, 1, 1, second)
    with pytest.raises(ValueError, match="position: data: expected files, got shards"):
        make(pictures).batches(2, 1, 1, position)


# ------------------------------------------------------------------------------------------------
# URLs


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder. Of /broken/ it sends a half of the file first, then breaks off."""

    asked: list

    def do_GET(self):
        self.asked.append(self.path)
        if not self.path.startswith("/broken/"):
            return super().do_GET()
        with open(self.translate_path(self.path.replace("/broken", "")), "rb") as file:
            data = file.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.asked.count(self.path) == 1 else data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    """The folder of the shards over HTTP: (URL, paths asked for)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shards_module, "PAUSE", 0.01)
    handler = type("Handler", (_Handler,), {"asked": []})
    start = functools.partial(handler, directory=os.path.dirname(shards))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), start) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}", handler.asked
        served.shutdown()


def test_shards_from_a_url(server, shards):
    url, asked = server
    data = TrainingImages([f"{url}/train-{{000..007}}.tar"], 8, WHOLE, 1)
    local = TrainingImages([shards], 8, WHOLE, 1)
    assert data.description["shards"] == 8 and data.description != local.description
    assert not asked  # nothing is fetched before it is needed
    assert torch.equal(*(torch.cat(steps(d.batches(12, 6), 3)) for d in (data, local)))


def test_a_connection_that_breaks_is_taken_up_again(server):
    url, asked = server
    batches = TrainingImages([f"{url}/broken/train-003.tar"], 8, WHOLE, 0).batches(6, 6)
    assert sorted(greys(*steps(batches, 1))) == list(range(12, 18))
    assert asked == ["/broken/train-003.tar"] * 2 and not batches.skipped


def test_an_unreachable_shard_is_tried_again_then_left_out(server, capfd):
    url, asked = server
    sources = [f"{url}/none.tar", f"{url}/train-000.tar"]
    batches = TrainingImages(sources, 8, WHOLE, 0).batches(3, 3)
    assert [sorted(greys(images)) for images in steps(batches, 2)] == [[0, 1, 2]] * 2
    assert asked.count("/none.tar") in (4, 8) and len(batches.skipped) == 1
    assert capfd.readouterr().err.count("none.tar: cannot read the shard after 0 samples") == 1


def test_shards_from_a_command(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSE", 0.01)
    path = shards.replace("{000..007}", "003")
    (images,) = steps(TrainingImages([f"pipe:cat {path}"], 8, WHOLE, 0).batches(6, 6), 1)
    assert sorted(greys(images)) == list(range(12, 18))
    # a command that is not done when the archive is
    (tmp_path / "more").write_bytes(bytes(2**20))
    samples = list(shards_module.read_shard(f"pipe:exec cat {path} {tmp_path}/more"))
    assert len(samples) == 6 and not any(sample.problem for sample in samples)
    samples = list(shards_module.read_shard(f"pipe:head -c 5000 {path}; exit 3"))
    assert len(samples) > 1 and samples[-1].ends_shard and "ended with status 3" in samples[-1].problem


# ------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("processes, batch", [(1, 4), (2, 4), (4, 5), (5, 2)])
def test_held_out_images_come_once_and_in_as_many_batches_to_each(pictures, shards, processes, batch):
    for source, total in ((pictures, 6), (shards, 36)):
        got = [list(HeldOutBatches([source], 8, batch, rank, processes)) for rank in range(processes)]
        assert len({len(batches) for batches in got}) == 1
        assert all(images.shape == (batch, 3, 8, 8) for batches in got for images, _ in batches)
        real = [torch.cat([images[:count] for images, count in batches]) for batches in got]
        assert sum(map(len, real)) == total
        if source is pictures:
            expected = torch.stack([resize_crop(read_image(path), 8) for path in list_images([pictures])])
            assert all(torch.equal(r, expected[rank::processes]) for rank, r in enumerate(real))
        else:
            assert [greys(r) for r in real] == [list(range(rank, 36, processes)) for rank in range(processes)]


def test_held_out_padding_and_unreadable_images(pictures, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    good = list_images([pictures])
    paths = [tmp_path / "bad.png", good[0], good[1], good[2], good[3]]
    first, second = (list(HeldOutBatches(paths, 8, 2, rank, 2)) for rank in (0, 1))
    assert [count for _, count in first] == [1, 1] and [count for _, count in second] == [2, 0]
    assert torch.equal(first[0][0][0], resize_crop(read_image(good[1]), 8))
    assert torch.equal(first[0][0][1], first[0][0][0])
    assert not second[1][0].any()
    assert capsys.readouterr().err.count("bad.png") == 1


def test_held_out_images_are_read_lazily_and_a_damaged_shard_up_to_the_damage(pictures, tmp_path, capfd):
    pytest.importorskip("webdataset")
    path = write_tar(tmp_path / "a.tar", grey_members(0, 6))
    damage_header(path)
    batches = iter(HeldOutBatches([path], 8, 2))
    assert greys(next(batches)[0]) == [0, 1]
    assert [(greys(images)[0], count) for images, count in batches] == [(2, 1)]
    assert capfd.readouterr().err.count("a.tar: cannot read the shard after 3 samples") == 1
    with pytest.raises(ValueError, match="no images found"):
        list(HeldOutBatches([write_tar(tmp_path / "empty.tar", [])], 8, 2))
    with pytest.raises(FileNotFoundError):
        HeldOutBatches([tmp_path / "none.png"], 8, 2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        HeldOutBatches([pictures], 8, 0)
