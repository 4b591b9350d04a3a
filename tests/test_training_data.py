"""Training images: the same whoever reads them, resumed exactly, and nothing bad stops them."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading

import pytest
import torch

from semhitok.config import DataConfig
from semhitok.data.crops import RandomCrops
from semhitok.data.images import read_image, save_png
from semhitok.data.training import TrainingImages, held_out_batches

SIZE = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(5)
    for n in range(6):
        save_png(torch.rand(3, 24 + n, 30, generator=generator), folder / f"{n}.png")
    return folder


def grey(number):
    """A picture that says its number."""
    buffer = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (SIZE, SIZE), (number, number, number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of 5, 6, 7 and 8 pictures, numbered through."""
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard in range(4):
        members = []
        for _ in range(5 + shard):
            members += [(f"{number:03}.png", grey(number)), (f"{number:03}.txt", b"words")]
            number += 1
        write_shard(folder / f"{shard}.tar", members)
    return f"{folder}/{{0..3}}.tar"


def steps(images, count, *, batch_size=4, micro_batch=1, step=0, position=None):
    """The batches of some steps as (first, images) pairs, and the position after each step."""
    batches = images.batches(batch_size, micro_batch, step, position)
    given, positions = [], []
    for _ in range(count):
        micro = next(batches)
        assert all(m.total == batch_size and len(m.images) == micro_batch for m in micro)
        given.append([(m.first, m.images) for m in micro])
        positions.append(batches.position())
    batches.close()
    return given, positions, batches.skipped


def numbers(given):
    return [round(float(image[0, 0, 0]) * 255) for step in given for _, images in step for image in images]


def test_crops_are_the_golden_ones(pictures, tmp_path):
    generator = torch.Generator().manual_seed(5)
    for n in range(3):
        save_png(torch.rand(3, 40 + n, 50, generator=generator), tmp_path / f"{n}.png")
    for scale, golden in ((None, "ba04783011ecfa3e"), ((0.5, 1.0), "90e78631cb67217b")):
        crops = RandomCrops(sorted(tmp_path.iterdir()), 24, DataConfig(crop_scale=scale), 7)
        pixels = torch.stack([crops[n][0] for n in range(5)]).mul(255).round().to(torch.uint8)
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == golden


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "workers"), [(1, 4, 0), (1, 2, 2), (2, 1, 0), (4, 1, 0), (2, 2, 1)]
)
def test_files_give_the_same_batches_to_any_number_of_processes(pictures, world_size, micro_batch, workers):
    crops = RandomCrops(sorted(pictures.iterdir()), SIZE, DataConfig(), 3)
    for rank in range(world_size):
        images = TrainingImages([pictures], SIZE, DataConfig(workers=workers), 3, rank=rank, world_size=world_size)
        given, _, skipped = steps(images, 3, micro_batch=micro_batch, step=5)
        assert skipped == 0
        for step, micro in enumerate(given, 5):
            assert [first for first, _ in micro] == list(
                range(rank * 4 // world_size, (rank + 1) * 4 // world_size, micro_batch)
            )
            for first, batch in micro:
                for place, image in enumerate(batch, first):
                    assert torch.equal(image, crops[step * 4 + place][0])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_an_epoch_of_shards_gives_every_image_once(shards, world_size, workers):
    config = DataConfig(crop_scale=None, flip=False, workers=workers, shuffle_buffer=4)
    seen = []
    for rank in range(world_size):
        images = TrainingImages([shards], SIZE, config, 1, rank=rank, world_size=world_size)
        assert images.description["shards"] == 4
        stream = images.batches(world_size, 1, 0, None)
        own = []
        while True:  # until every stream of this process is in its second epoch
            (micro,) = next(stream)
            places = stream.position()["places"]
            if all(epoch >= 1 for epoch, *_ in places):
                break
            # Streams of different length: those that are ahead have begun again.
            own.append(round(float(micro.images[0, 0, 0, 0]) * 255))
        stream.close()
        seen += own
    assert set(seen) == set(range(26))
    if world_size == 1 and workers == 0:
        assert len(seen) == 26


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_go_on_exactly_where_they_stopped(shards, world_size, workers):
    config = DataConfig(workers=workers, shuffle_buffer=5)
    for rank in range(world_size):
        images = TrainingImages([shards], SIZE, config, 1, rank=rank, world_size=world_size)
        whole, positions, _ = steps(images, 12)
        for stop in (1, 2, 5, 8) if workers else range(1, 11):
            buffer = io.BytesIO()
            torch.save(positions[stop - 1], buffer)
            buffer.seek(0)
            position = torch.load(buffer, weights_only=True)
            rest, later, _ = steps(images, 2, step=stop, position=position)
            for a, b in zip(rest, whole[stop : stop + 2], strict=True):
                assert all(f == g and torch.equal(x, y) for (f, x), (g, y) in zip(a, b, strict=True))
            assert later == positions[stop : stop + 2]


def test_epochs_of_shards_differ_in_order(shards):
    images = TrainingImages([shards], SIZE, DataConfig(crop_scale=None, shuffle_buffer=100), 1)
    given, _, _ = steps(images, 13)
    first, second = numbers(given)[:26], numbers(given)[26:52]
    assert sorted(first) == sorted(second) == list(range(26))
    assert first != second
    other, _, _ = steps(images.other(1), 6)
    assert numbers(other)[:24] != first[:24]


def test_bad_samples_and_broken_shards_are_named_counted_and_passed_over(tmp_path, capsys):
    write_shard(
        tmp_path / "0.tar", [("a.png", grey(1)), ("b.png", b"no image"), ("c.txt", b"words"), ("d.png", grey(2))]
    )
    write_shard(tmp_path / "1.tar", [(f"{n}.png", grey(n)) for n in range(10, 14)])
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: 512 * 4 + 600])  # in the third picture
    images = TrainingImages([f"{tmp_path}/{{0,1}}.tar"], SIZE, DataConfig(crop_scale=None, shuffle_buffer=3), 0)
    given, positions, skipped = steps(images, 8, batch_size=1)
    assert set(numbers(given)) == {1, 2, 10, 11}
    assert skipped >= 3 and positions[-1]["skipped"] == skipped
    err = capsys.readouterr().err
    assert "0.tar: b: not an image of a known format" in err
    assert "0.tar: c: no image" in err
    assert "1.tar: the rest cannot be read" in err
    # the count goes on where the position stood
    _, later, _ = steps(images, 1, batch_size=1, step=8, position=positions[-1])
    assert later[0]["skipped"] >= skipped


def test_shards_without_a_usable_image_are_an_error(tmp_path):
    write_shard(tmp_path / "0.tar", [("a.txt", b"words")])
    with pytest.raises(ValueError, match="none of the images of a whole epoch could be read"):
        steps(TrainingImages([f"{tmp_path}/0.tar"], SIZE, DataConfig(), 0), 1)
    write_shard(tmp_path / "1.tar", [])
    with pytest.raises(ValueError, match="no samples in 1 shards"):
        steps(TrainingImages([f"{tmp_path}/1.tar"], SIZE, DataConfig(), 0), 1)


def test_what_cannot_be_trained_on_is_refused(shards, pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such shard"):
        TrainingImages([shards.replace("..3", "..4")], SIZE, DataConfig(), 0)
    with pytest.raises(ValueError, match="expected image files or shards, got both"):
        TrainingImages([shards, pictures], SIZE, DataConfig(), 0)
    with pytest.raises(ValueError, match="expected at least 6 shards, one for each worker of each process, got 4"):
        TrainingImages([shards], SIZE, DataConfig(workers=3), 0, rank=0, world_size=2)
    images = TrainingImages([shards], SIZE, DataConfig(), 0)
    _, positions, _ = steps(images, 1)
    other = TrainingImages([shards], SIZE, DataConfig(workers=2), 0)
    with pytest.raises(ValueError, match="expected one of 1 processes with 2 streams each, got one of 1 with 1"):
        other.batches(4, 1, 1, positions[0])
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of .* = 1 \* 3, got 4"):
        images.batches(4, 3, 0, None)


def test_shards_come_over_http(shards):
    folder = shards.rpartition("/")[0]
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{{0..3}}.tar"
        images = TrainingImages([url], SIZE, DataConfig(crop_scale=None, shuffle_buffer=100), 1)
        given, _, skipped = steps(images, 13, batch_size=2)
        server.shutdown()
    assert sorted(numbers(given)) == list(range(26)) and skipped == 0


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_images_come_once_over_all_processes(shards, pictures, world_size, tmp_path, capsys):
    found, lengths = [], set()
    for rank in range(world_size):
        batches = list(held_out_batches([shards], SIZE, 4, rank, world_size))
        lengths.add(len(batches))
        for images, count in batches:
            assert images.shape == (4, 3, SIZE, SIZE)
            found += [round(float(x[0, 0, 0]) * 255) for x in images[:count]]
    assert sorted(found) == list(range(26)) and len(lengths) == 1
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    counts = [
        [count for _, count in held_out_batches([pictures, bad], SIZE, 2, rank, world_size)]
        for rank in range(world_size)
    ]
    assert sum(map(sum, counts)) == 6 and len(set(map(len, counts))) == 1
    assert capsys.readouterr().err.count("bad.png") == 1


def test_an_unreadable_file_is_replaced_and_counted(pictures, tmp_path, capsys):
    good = sorted(pictures.iterdir())[0]
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    _, positions, skipped = steps(TrainingImages([bad, good], SIZE, DataConfig(), 0), 3)
    assert skipped == 6 and positions[-1] == {"skipped": 6}  # half of the samples
    assert capsys.readouterr().err.count("bad.png") == 1
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        steps(TrainingImages([bad], SIZE, DataConfig(), 0), 1)


def test_every_epoch_sees_each_image_once(pictures):
    paths = sorted(pictures.iterdir())
    data = RandomCrops(paths, 16, DataConfig(), 0)
    seen = []
    original = data._load
    data._load = lambda index: (seen.append(index), original(index))[1]
    for n in range(18):
        data[n]
    assert [sorted(seen[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
    assert seen[:6] != seen[6:12] or seen[6:12] != seen[12:]


def test_small_images_are_enlarged_to_a_crop(tmp_path):
    save_png(torch.full((3, 1, 1), 0.5), tmp_path / "dot.png")
    data = RandomCrops([tmp_path / "dot.png"], 16, DataConfig(crop_scale=None), 0)
    assert (data[0][0] - 0.5).abs().max() < 0.01
    assert read_image(tmp_path / "dot.png").shape == (3, 1, 1)
