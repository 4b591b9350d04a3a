"""Generation: ids stay where they may be, caches and batches change nothing, guidance, hierarchical draws."""

import math

import pytest
import torch

from semhitok.tokenizer import Features

transformers = pytest.importorskip("transformers")

from mllm_small import HEADS, OFFSETS, TEXT, TOKENIZER, image_ids, small_model  # noqa: E402

from semhitok.mllm import Sampling, generate, generate_images  # noqa: E402
from semhitok.mllm.generate import GREEDY, Draw, Grammar, Guidance, left_pad  # noqa: E402

EOS = 1
PROMPTS = [[5, 6, 7, 8], [9], [3, 2, 11]]


def begin(model, prompts=PROMPTS):
    return [[*prompt, model.vocabulary.begin_of_image] for prompt in prompts]


def check(model, prompt, new, *, num_text_ids=TEXT, images=True):
    """Walk through a row by the rules of the vocabulary; the number of whole images."""
    vocabulary, config = model.vocabulary, model.config
    expected = []  # of each id still to come in the image: "resolution", "image", "end"
    whole = 0
    order = ["resolution"] * config.resolution_id + ["image"] * config.grid_size**2 + ["end"]
    for place, id_ in enumerate([*prompt, *new]):
        if expected:
            kind = expected.pop(0)
            if kind == "image":
                assert TEXT <= id_ < vocabulary.begin_of_image
            else:
                end = kind == "end"
                assert id_ == (vocabulary.end_of_image if end else vocabulary.resolution(config.image_size))
                whole += end
        elif id_ == vocabulary.begin_of_image:
            assert images or place < len(prompt)
            expected = list(order)
        else:
            assert 0 <= id_ < (num_text_ids if place >= len(prompt) else TEXT)
    assert not expected
    return whole


@pytest.mark.parametrize("head", HEADS)
def test_ids_never_leave_their_ranges(head):
    torch.manual_seed(0)
    model = small_model(head=head, resolution_id=True)
    with torch.no_grad():  # images often enough
        model.special_head.weight[0] = model.text_head.weight[:8].mean(0) * 2
    prompts = [([*p] if n % 2 else [*p, model.vocabulary.begin_of_image]) for n, p in enumerate(PROMPTS * 334)]
    count = images = 0
    for seed in range(10):
        rows = generate(
            model, prompts, max_new_tokens=19, num_text_ids=30, eos_id=EOS,
            sampling=Sampling(temperature=1.5, hierarchical=seed % 2 == 1),
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        for prompt, row in zip(prompts, rows, strict=True):
            images += check(model, prompt, row.tolist(), num_text_ids=30)
            assert EOS not in row[:-1]
        count += len(rows)
    assert count >= 10_000 and images > 0.6 * count  # half of them begun by the prompt


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_cache_and_batch_change_no_id(kind, head):
    model = small_model(kind, head).double()
    image = image_ids(model)[0][0].tolist()
    prompts = [*begin(model), [*image, 4, 5], [7, *image]]
    options = {"max_new_tokens": 14, "sampling": GREEDY, "eos_id": EOS}
    together = generate(model, prompts, **options)
    for prompt, new in zip(prompts, together, strict=True):
        assert generate(model, [prompt], **options)[0].tolist() == new.tolist()
        assert generate(model, [prompt], **options, use_cache=False)[0].tolist() == new.tolist()
        # by hand, through plain forward passes
        ids = list(prompt)
        grammar = Grammar(model.config, max_length=len(prompt) + 14)
        while len(ids) < len(prompt) + len(new):
            row = torch.tensor([ids])
            ids.append(int(grammar(row, model(input_ids=row).logits[:, -1]).argmax()))
        assert ids[len(prompt) :] == new.tolist()
    uncached = generate(model, prompts, **options, use_cache=False)
    assert [x.tolist() for x in uncached] == [x.tolist() for x in together]
    assert len({tuple(x.tolist()) for x in together}) == len(prompts)


def test_prompts_of_vectors_are_prompts_of_ids():
    model = small_model().double()
    image, codes = image_ids(model, 2)
    ids = torch.cat([image, torch.tensor([[5], [6]])], dim=1)
    marks = torch.where((ids >= TEXT) & (ids < model.vocabulary.begin_of_image), TEXT, ids)
    features = TOKENIZER.features(codes)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0}
    expected = model.generate(ids, **options)[:, ids.shape[1] :]
    assert torch.equal(model.generate(marks, image_features=features, **options)[:, ids.shape[1] :], expected)
    swapped = Features(features.semantic.flip(0), features.pixel.flip(0))
    assert not torch.equal(model.generate(marks, image_features=swapped, **options)[:, ids.shape[1] :], expected)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
)
def test_prompts_of_vectors_have_beams_and_several_sequences(options):
    model = small_model()
    images, codes = image_ids(model, 3)
    text = torch.tensor([[5, 6, 7], [8, 9, 10]])
    # rows with different numbers of images
    ids, mask = left_pad([torch.cat([text[0], images[0], images[1]]), torch.cat([text[1], images[2]])])
    options = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 10**9, **options}

    def sequences(**more):
        torch.manual_seed(0)
        return model.generate(ids, **options, **more)

    expected = sequences()
    assert len(expected) == 2 * options.get("num_return_sequences", 1)
    features = TOKENIZER.features(codes)
    assert torch.equal(sequences(image_features=features), expected)
    assert not torch.equal(sequences(image_features=type(features)(*(x.flip(0) for x in features))), expected)
    with pytest.raises(ValueError, match=r"image_features.semantic: expected 12 vectors of dimension 6, got"):
        sequences(image_features=TOKENIZER.features(codes[:2]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance": math.nan}, "guidance: expected a finite number, got nan"),
        ({"guidance": math.inf}, "guidance: expected a finite number, got inf"),
        ({"guidance": -1.0}, "guidance: expected at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature: expected a finite number, got nan"),
        ({"temperature": math.inf}, "temperature: expected a finite number, got inf"),
        ({"temperature": -0.5}, "temperature: expected at least 0, got -0.5"),
        ({"top_k": -1}, "top_k: expected at least 1, or 0 for all, got -1"),
        ({"top_p": 0.0}, "top_p: expected more than 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected more than 0 and at most 1, got 1.5"),
        ({"top_p": math.nan}, "top_p: expected more than 0 and at most 1, got nan"),
    ],
)
def test_sampling_names_what_is_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_text_mode_emits_no_image():
    model = small_model()
    with torch.no_grad():
        model.special_head.weight.mul_(100)
        model.image_head.weight.mul_(100)
    rows = generate(model, PROMPTS * 20, max_new_tokens=10, images=False, generator=torch.Generator().manual_seed(0))
    for prompt, row in zip(PROMPTS * 20, rows, strict=True):
        assert check(model, prompt, row.tolist(), images=False) == 0 and len(row) == 10


def test_no_image_begins_that_would_be_cut_off():
    model = small_model()
    grammar = Grammar(model.config, max_length=9)
    scores = torch.zeros(1, model.vocabulary.size)
    place = model.vocabulary.begin_of_image
    assert grammar(torch.zeros(1, 3, dtype=torch.int64), scores)[0, place] == 0  # 3 + begin, 4 ids, end = 9
    assert grammar(torch.zeros(1, 4, dtype=torch.int64), scores)[0, place] == -torch.inf
    with pytest.raises(ValueError, match="num_text_ids: expected 1 to 40, got 41"):
        Grammar(model.config, num_text_ids=41)


def test_generated_images_are_found_and_decoded():
    model = small_model(resolution_id=True)
    codes = generate_images(model, PROMPTS, generator=torch.Generator().manual_seed(0))
    assert codes.shape == (3, 2, 2)
    assert TOKENIZER.decode(codes).shape == (3, 3, 16, 16)
    vocabulary = model.vocabulary
    ids = [vocabulary.image(code, TOKENIZER.codebook_hash, 16) for code in codes]
    row = torch.cat([torch.tensor([5]), ids[0], ids[1], torch.tensor([6, 7]), ids[2], ids[0][:4]])
    assert [x.tolist() for x in vocabulary.images(row)] == codes.flatten(1).tolist()


@pytest.mark.parametrize("head", ["flat", "hierarchical, adaptive"])
def test_guidance_is_the_mixture_of_both_prompts(head):
    """The first image id of a guided row, drawn many times, follows u + s (c - u)."""
    model = small_model(head=head).double()
    vocabulary, scale = model.vocabulary, 2.5
    prompt, free = begin(model)[0], [vocabulary.begin_of_image]
    given, without = (model(input_ids=torch.tensor([x])).logits[0, -1, TEXT:-2] for x in (prompt, free))
    expected = (without + scale * (given - without)).softmax(-1)
    assert (expected - given.softmax(-1)).abs().sum() > 0.1  # the caption matters
    ids, mask = left_pad([prompt, free])
    grammar = Grammar(model.config)
    scores = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits[:, -1]
    guided = grammar(ids, Guidance(scale, grammar)(ids, scores))
    assert torch.equal(guided[0], guided[1])
    torch.testing.assert_close(guided[0].softmax(-1)[TEXT:-2], expected.float(), atol=1e-6, rtol=1e-5)
    count = 4000
    options = {"sampling": Sampling(guidance=scale), "generator": torch.Generator().manual_seed(0)}
    codes = generate_images(model, [prompt[:-1]] * count, **options)[:, 0, 0]
    share = torch.bincount(codes, minlength=15) / count
    assert (share - expected).abs().max() < 4 * 0.5 / count**0.5


def test_guidance_of_one_and_equal_prompts_change_nothing():
    model = small_model().double()
    plain = generate_images(model, PROMPTS, sampling=GREEDY)
    assert torch.equal(generate_images(model, PROMPTS, sampling=Sampling(temperature=0, guidance=1.0)), plain)
    guided = Sampling(temperature=0, guidance=3.0)
    same = [generate_images(model, [p], sampling=guided, unconditional=p) for p in PROMPTS]
    assert torch.equal(torch.cat(same), plain)
    assert not torch.equal(generate_images(model, PROMPTS, sampling=Sampling(temperature=0, guidance=9.0)), plain)
    with pytest.raises(ValueError, match="unconditional: expected 3 prompts for guidance, got none"):
        generate(model, PROMPTS, max_new_tokens=3, sampling=Sampling(guidance=2.0))


@pytest.mark.parametrize("head", [*HEADS, "flat, adaptive"])
def test_hierarchical_draws_follow_the_same_distribution(head):
    model = small_model(head=head).double()
    prompt, count = begin(model)[0], 4000
    expected = model(input_ids=torch.tensor([prompt])).logits[0, -1, TEXT:-2].softmax(-1)
    sampling, generator = Sampling(hierarchical=True), torch.Generator().manual_seed(0)
    codes = generate_images(model, [prompt[:-1]] * count, sampling=sampling, generator=generator)[:, 0, 0]
    assert (torch.bincount(codes, minlength=15) / count - expected).abs().max() < 4 * 0.5 / count**0.5
    # the best code, then its best sub-code: not the best id
    blocks = expected.split(OFFSETS.diff().tolist() if "adaptive" in head else 3)
    code = max(range(5), key=lambda i: blocks[i].sum())
    best = model.vocabulary.flat(code, int(blocks[code].argmax()))
    greedy = Sampling(temperature=0, hierarchical=True)
    assert generate_images(model, [prompt[:-1]], sampling=greedy)[0, 0, 0] == best
    # top_k holds for both draws
    sampling = Sampling(top_k=2, hierarchical=True)
    codes = generate_images(model, [prompt[:-1]] * 500, sampling=sampling, generator=generator)[:, 0, 0]
    best_codes = torch.stack([block.sum() for block in blocks]).topk(2).indices.tolist()
    allowed = [model.vocabulary.flat(i, j) for i in best_codes for j in blocks[i].topk(min(2, len(blocks[i]))).indices]
    assert set(codes.tolist()) <= {int(x) for x in allowed}


def test_hierarchical_draw_takes_the_code_first():
    model = small_model()
    grammar = Grammar(model.config)
    ids = torch.tensor([[model.vocabulary.begin_of_image]])
    scores = torch.full((1, model.vocabulary.size), -torch.inf)
    chances = torch.tensor([0.4, 0.0, 0.0, 0.3, 0.3, 0.0] + [0.0] * 9)
    scores[0, TEXT:-2] = chances.log()
    greedy = Sampling(temperature=0, hierarchical=True)
    assert Draw(grammar, GREEDY)(ids, scores).argmax() == TEXT
    assert Draw(grammar, greedy)(ids, scores).argmax() in (TEXT + 3, TEXT + 4)
    adaptive = Grammar(small_model(head="flat, adaptive").config)
    draw = Draw(adaptive, greedy, offsets=OFFSETS)  # 1 + 3 + ...: the second code is best
    assert draw(ids, scores).argmax() in (TEXT + 3, TEXT + 4)
    with pytest.raises(ValueError, match="offsets: expected those of the adaptive sizes"):
        Draw(adaptive, Sampling(hierarchical=True))


def test_top_k_top_p_and_temperature_narrow_the_draw():
    grammar = Grammar(small_model().config)
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(2000, 1)
    ids = torch.zeros(2000, 1, dtype=torch.int64)

    def shares(**options):
        drawn = Draw(grammar, Sampling(**options), generator=torch.Generator().manual_seed(0))(ids, scores).argmax(1)
        return torch.bincount(drawn, minlength=4) / 2000

    assert (shares() - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.045
    assert (shares(top_k=2) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.045
    assert shares(top_p=0.7)[2:].sum() == 0 and shares(top_p=0.7)[1] > 0
    sharp = torch.tensor([0.5, 0.3, 0.15, 0.05]).square()
    assert (shares(temperature=0.5) - sharp / sharp.sum()).abs().max() < 0.045
    assert shares(temperature=0)[0] == 1
    with pytest.raises(ValueError, match="temperature: expected at least 0, got -1"):
        Sampling(temperature=-1)


def test_generators_repeat_themselves():
    model = small_model()
    first, again, other = (
        generate_images(model, PROMPTS * 5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_left_pad_and_bad_prompts():
    ids, mask = left_pad([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"prompts: expected one or more, none of them empty, got lengths \[1, 0\]"):
        left_pad([[1], []])
    with pytest.raises(ValueError, match=r"pad_id: expected a text id in \[0, 40\), got 40"):
        generate(small_model(), PROMPTS, max_new_tokens=1, pad_id=40)
