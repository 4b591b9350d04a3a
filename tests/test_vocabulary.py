"""Ids and offsets of `semhitok.vocabulary`, and the name of a codebook."""

import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semhitok.vocabulary import Vocabulary, codebook_hash

VOCABULARY = Vocabulary(256, 8, text_size=1000, resolutions=(64, 128))


@st.composite
def vocabularies(draw):
    return Vocabulary(draw(st.integers(1, 2**20)), draw(st.integers(1, 64)), draw(st.integers(0, 2**18)))


@settings(deadline=None)
@given(vocabularies(), st.data())
def test_flat_and_split_are_inverse(vocabulary, data):
    i = data.draw(st.integers(0, vocabulary.num_codes - 1))
    j = data.draw(st.integers(0, vocabulary.num_sub_codes - 1))
    h = vocabulary.flat(i, j)
    assert h == i * vocabulary.num_sub_codes + j
    assert vocabulary.split(h) == (i, j)


@settings(deadline=None)
@given(vocabularies(), st.data())
def test_to_text_and_from_text_are_inverse(vocabulary, data):
    h = data.draw(st.integers(0, vocabulary.num_flat_codes - 1))
    assert vocabulary.to_text(h) == h + vocabulary.text_size
    assert vocabulary.from_text(vocabulary.to_text(h)) == h


@settings(deadline=None)
@given(vocabularies(), st.lists(st.integers(0, 2**60), min_size=1), st.data())
def test_tensors_equal_ints(vocabulary, numbers, data):
    numbers = [number % vocabulary.num_flat_codes for number in numbers]
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    codes = torch.tensor(numbers).to(dtype)
    semantic, sub = vocabulary.split(codes)
    assert semantic.dtype == sub.dtype == torch.int64
    pairs = list(zip(semantic.tolist(), sub.tolist(), strict=True))
    assert pairs == [vocabulary.split(number) for number in numbers]
    assert vocabulary.flat(semantic.to(dtype), sub.to(dtype)).tolist() == numbers
    text = vocabulary.to_text(codes)
    assert text.tolist() == [vocabulary.to_text(number) for number in numbers]
    assert torch.equal(vocabulary.from_text(text), codes.long())


def test_layout_has_no_gap_and_no_overlap():
    text = list(range(1000))
    image = [VOCABULARY.to_text(h) for h in range(256 * 8)]
    special = [VOCABULARY.begin_of_image, VOCABULARY.end_of_image]
    special += [VOCABULARY.resolution(64), VOCABULARY.resolution(128)]
    assert text + image + special == list(range(VOCABULARY.size))


def test_narrow_integers_do_not_wrap():
    assert VOCABULARY.flat(torch.tensor([200], dtype=torch.uint8), torch.tensor([7])) == 1607
    assert VOCABULARY.to_text(torch.tensor([127], dtype=torch.int8)).tolist() == [1127]


def test_empty_and_shaped_tensors():
    assert VOCABULARY.check(torch.empty(0, 3, dtype=torch.int32)).shape == (0, 3)
    assert VOCABULARY.split(torch.zeros(2, 3, 4, dtype=torch.int64))[0].shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("method", "argument", "words"),
    [
        ("split", 2048, "codes: expected ids in [0, 2048), got 2048"),
        ("split", -1, "codes: expected ids in [0, 2048), got -1"),
        ("split", torch.tensor([0, 5000, 3]), "codes: expected ids in [0, 2048), got 5000"),
        ("split", torch.tensor([0, -7]), "codes: expected ids in [0, 2048), got -7"),
        ("split", torch.tensor([0.0]), "codes: expected integers, got torch.float32"),
        ("split", torch.tensor([True]), "codes: expected integers, got torch.bool"),
        ("split", 1.0, "codes: expected an int or integer tensor, got float"),
        ("to_text", 2048, "codes: expected ids in [0, 2048), got 2048"),
        ("from_text", 999, "ids: expected ids in [1000, 3048), got 999"),
        ("from_text", 3048, "ids: expected ids in [1000, 3048), got 3048"),
        ("resolution", 65, "pixels: expected one of (64, 128), got 65"),
    ],
)
def test_out_of_range_is_named(method, argument, words):
    with pytest.raises(ValueError) as error:
        getattr(VOCABULARY, method)(argument)
    assert str(error.value) == words


def test_flat_checks_both_parts():
    with pytest.raises(ValueError, match=r"semantic: expected ids in \[0, 256\), got 256"):
        VOCABULARY.flat(256, 0)
    with pytest.raises(ValueError, match=r"sub: expected ids in \[0, 8\), got 8"):
        VOCABULARY.flat(torch.tensor([0, 1]), torch.tensor([7, 8]))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 8), "num_codes"),
        ((256, 0), "num_sub_codes"),
        ((256, 8, -1), "text_size"),
        ((2**40, 2**40), "num_codes"),
        ((2.0, 8), "num_codes"),
        ((256, 8, 0, None, (64, 64)), "resolutions"),
    ],
)
def test_bad_vocabularies_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        Vocabulary(*arguments)


def test_check_hash():
    Vocabulary(2, 2, codebook_hash="ab").check_hash("ab")
    for own, other in (("ab", "cd"), ("ab", None), (None, "ab"), (None, None)):
        with pytest.raises(ValueError, match="codebook_hash: expected"):
            Vocabulary(2, 2, codebook_hash=own).check_hash(other)


def test_codebook_hash_is_shapes_and_little_endian_fp32():
    sem, pix = torch.arange(6.0).view(3, 2), torch.arange(12.0).view(3, 2, 2) - 5
    expected = hashlib.sha256(
        b"semhitok codebooks 1"
        + b"[3, 2]"
        + struct.pack("<6f", *sem.flatten().tolist())
        + b"[3, 2, 2]"
        + struct.pack("<12f", *pix.flatten().tolist())
    )
    assert codebook_hash(sem, pix) == expected.hexdigest()


def test_codebook_hash_sees_values_and_shapes_only():
    sem, pix = torch.randn(4, 6), torch.randn(4, 3, 2)
    digest = codebook_hash(sem, pix)
    strided = sem.t().contiguous().t()
    assert codebook_hash(torch.nn.Parameter(strided), pix.double()) == digest
    half = codebook_hash(sem.half(), pix.half())
    assert half == codebook_hash(sem.half().float(), pix.half().float()) != digest
    assert codebook_hash(sem, pix.view(4, 2, 3)) != digest
    changed = pix.clone()
    changed[3, 2, 1] = torch.nextafter(changed[3, 2, 1], torch.tensor(9.0))
    assert codebook_hash(sem, changed) != digest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_codebook_hash_is_the_same_on_a_gpu():
    sem, pix = torch.randn(4, 6), torch.randn(4, 3, 2)
    assert codebook_hash(sem.cuda(), pix.cuda()) == codebook_hash(sem, pix)


def test_codebook_hash_checks_shapes():
    with pytest.raises(ValueError, match="sem_codebook"):
        codebook_hash(torch.zeros(3), torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="pix_codebook"):
        codebook_hash(torch.zeros(3, 2), torch.zeros(4, 2, 2))


def test_image_puts_ids_between_begin_and_end():
    vocabulary = Vocabulary(4, 3, text_size=10, codebook_hash="ab", resolutions=(64,))
    codes = torch.tensor([[[0, 1], [2, 11]], [[5, 5], [5, 5]]])
    assert vocabulary.image(codes, "ab").tolist() == [[22, 10, 11, 12, 21, 23], [22, 15, 15, 15, 15, 23]]
    assert vocabulary.image(codes[0], "ab", 64).tolist() == [22, 24, 10, 11, 12, 21, 23]
    with pytest.raises(ValueError, match="codebook_hash: expected ids of codebook ab, got ids of codebook cd"):
        vocabulary.image(codes, "cd")
    with pytest.raises(ValueError, match=r"codes: expected shape \[\.\.\., h, w\], got \[4\]"):
        vocabulary.image(codes[0].flatten(), "ab")
    with pytest.raises(ValueError, match="pixels: expected one of"):
        vocabulary.image(codes, "ab", 65)


def test_images_are_the_whole_ones():
    vocabulary = Vocabulary(4, 3, text_size=10, codebook_hash="ab", resolutions=(64,))
    row = [3, 22, 24, 10, 21, 23, 4, 22, 11, 23, 22, 12]
    assert [x.tolist() for x in vocabulary.images(torch.tensor(row))] == [[0, 11], [1]]
    assert vocabulary.images(torch.tensor([1, 2])) == []
    assert [x.tolist() for x in vocabulary.images(torch.tensor([22, 10, 22, 11, 23]))] == [[1]]
    with pytest.raises(ValueError, match=r"ids: expected ids in \[10, 22\), got 5"):
        vocabulary.images(torch.tensor([22, 10, 5, 23]))
    with pytest.raises(ValueError, match=r"ids: expected shape \[T\], got \[1, 2\]"):
        vocabulary.images(torch.tensor([[22, 23]]))
