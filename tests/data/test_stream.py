"""The stream engine alone: turns, workers, positions, errors; and the table of kinds of sources."""

import multiprocessing

import pytest

from semhitok.data import kinds
from semhitok.data.stream import START, Batches, Item, ShuffledShards, share_of


class Count:
    """A stream of (number, place), 0, 1, ...; every value is one after a skipped record. It fails at `end`."""

    def __init__(self, number, place, end=None):
        self.number, self.place, self.end = number, place, end

    def __iter__(self):
        place = self.place
        while place != self.end:
            place += 1
            yield Item((self.number, place - 1), place, [f"record {place} of {self.number}"])
        raise ValueError("the stream is broken")


def batches(streams=4, size=3, workers=0, position=None, end=None):
    return Batches(
        lambda number, place: Count(number, place, end),
        {"data": "counts", "skipped": [], "turn": 0, "streams": [0] * streams},
        size,
        list,
        workers=workers,
        position=position,
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streams_take_turns_whoever_reads_them(workers):
    given = batches(workers=workers)
    got = [item for _ in range(6) for item in next(given)]
    assert got == [(n % 4, n // 4) for n in range(18)]
    known = given.skipped.state()
    assert given.position() == {"data": "counts", "skipped": known, "turn": 2, "streams": [5, 5, 4, 4]}
    assert len(known) == len(given.skipped) == 18
    given.close()
    assert not list(given)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", range(5))
def test_every_position_can_be_resumed(workers, done):
    whole = batches()
    for _ in range(done):
        next(whole)
    position = whole.position()
    resumed = batches(workers=workers, position=position)
    assert resumed.position() == position
    for _ in range(4):
        assert next(resumed) == next(whole)
    assert resumed.position() == whole.position()
    resumed.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_ends_the_batches_and_leaves_the_position_of_the_last_one(workers):
    given = batches(workers=workers, end=2)
    assert [next(given) for _ in range(2)]
    position = given.position()
    with pytest.raises(ValueError, match=r"^the stream is broken$"):
        next(given)
    assert given.position() == position and not list(given) and not multiprocessing.active_children()


def test_positions_of_other_data_are_refused():
    with pytest.raises(ValueError, match="position: data: expected counts, got shards; a run resumes only as it began"):
        batches(position={"data": "shards"})


def read(shard, skip):
    return iter([f"{shard}{n}" for n in range(skip, 5)])


@pytest.mark.parametrize("share_items", [False, True])
def test_shards_are_shuffled_in_blocks_and_resumed_inside_them(share_items):
    streams = [ShuffledShards("abcdef", read, 4, 7, n, 3, share_items) for n in range(3)]
    items = [[item for item, _ in stream.epoch(START)] for stream in streams]
    expected = [f"{shard}{n}" for shard in "abcdef" for n in range(5)]
    assert sorted(item for stream in items for item in stream) == expected
    for stream, whole in zip(streams, items, strict=True):
        places = [place for _, place in stream.epoch(START)]
        assert whole != sorted(whole)
        for done, place in enumerate(places, 1):
            assert [item for item, _ in stream.epoch(place)] == whole[done:]


def test_a_share_of_a_batch():
    assert share_of(12, 3, 2) == 6
    for arguments in ((12, 4, 2), (0, 1, 1), (4, 0, 1)):
        with pytest.raises(ValueError, match="batch_size: expected a multiple of processes x micro_batch"):
            share_of(*arguments)


def test_names_tell_the_kind_of_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "{braces}").write_text("")
    for kind, names in {
        kinds.JSONL: ("a.jsonl", "folder/A.JSONL"),
        kinds.IDS_FILE: ("ids.safetensors",),
        kinds.PARQUET: ("a.parquet", "{0..3}.parquet", "https://host/a.parquet"),
        kinds.SHARDS: ("a.tar", "a.TGZ", "a.tar.gz", "{0..3}", "pipe:cat a", "https://host/x", "file:/x/a", "s3://b/a"),
        kinds.FOLDER: ("folder", "."),
        kinds.IMAGE: ("a.png", "a", "folder/none", "{braces}", "tar", "a.tar.png"),
    }.items():
        assert {name: kinds.kind_of(name) for name in names} == dict.fromkeys(names, kind)
