"""The unified language model: ids in and out, losses without logits, packing, saving, LoRA."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")

from mllm_runs import small_tokenizer  # noqa: E402
from mllm_small import ADAPTIVE, HEADS, OFFSETS, TEXT, TOKENIZER, image_ids, llm_config, samples, small_model  # noqa: E402

import semhitok.mllm.loss as loss_module  # noqa: E402
from semhitok.mllm import UnifiedMLLM, UnifiedMLLMConfig, group_cross_entropy, join, linear_cross_entropy, pack  # noqa: E402
from semhitok.mllm.loss import group_logsumexp  # noqa: E402
from semhitok.mllm.model import DualAdapter  # noqa: E402
from semhitok.mllm.params import parameter_table, qwen2_5_7b  # noqa: E402

# ---- losses ----


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(loss_module, "TILE", 64)
        monkeypatch.setattr(loss_module, "TILE_TOKENS", 5)
        monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 3)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
def test_linear_cross_entropy_equals_the_plain_computation(frozen, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(23, 8)
    weights = [torch.randn(n, 8) for n in (13, 29, 2)]
    leaves = [hidden, *weights]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index not in frozen)
    targets = torch.randint(44, (23,))
    targets[[3, 22]] = -100
    scale = torch.rand(23)
    losses = linear_cross_entropy(hidden, weights, targets, softcap)
    logits = hidden @ torch.cat(weights).T
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    plain = F.cross_entropy(logits, targets, reduction="none")
    close(losses, plain)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    got = torch.autograd.grad((losses * scale).sum(), wanted)
    for a, b in zip(got, torch.autograd.grad((plain * scale).sum(), wanted), strict=True):
        close(a, b)


@pytest.mark.usefixtures("tiles")
def test_group_cross_entropy_equals_the_plain_computation():
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(6, 4, 8, requires_grad=True)
    groups, targets, scale = torch.randint(6, (23,)), torch.randint(4, (23,)), torch.rand(23)
    targets[[0, 9]] = -100
    losses = group_cross_entropy(hidden, weight, groups, targets)
    plain = F.cross_entropy(torch.einsum("nmw,nw->nm", weight[groups], hidden), targets, reduction="none")
    close(losses, plain)
    got = torch.autograd.grad((losses * scale).sum(), [hidden, weight])
    for a, b in zip(got, torch.autograd.grad((plain * scale).sum(), [hidden, weight]), strict=True):
        close(a, b)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_group_cross_entropy_of_groups_with_sizes_of_their_own(frozen):
    torch.manual_seed(0)
    sizes = [1, 40, 3, 2, 4, 1, 7, 5]  # groups 2 and 3, 4 and 6 go together, padded
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    leaves = [torch.randn(60, 8), torch.randn(63, 8)]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index not in frozen)
    hidden, weight = leaves
    groups, scale = torch.randint(7, (60,)), torch.rand(60)  # the last group has no token
    groups[:20] = 1
    targets = (torch.rand(60) * torch.tensor(sizes)[groups]).long()
    targets[[0, 33]] = -100
    losses = group_cross_entropy(hidden, weight, groups, targets, offsets)
    blocks = weight.split(sizes)
    plain = [F.cross_entropy(blocks[g] @ x, t) for g, x, t in zip(groups.tolist(), hidden, targets, strict=True)]
    plain = torch.stack(plain).where(targets >= 0, 0)
    close(losses, plain)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    got = torch.autograd.grad((losses * scale).sum(), wanted)
    for a, b in zip(got, torch.autograd.grad((plain * scale).sum(), wanted), strict=True):
        close(a, b)


def test_group_losses_name_what_is_wrong():
    hidden, offsets = torch.zeros(2, 4), torch.tensor([0, 1, 5])
    two = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 1\), got 1"):
        group_cross_entropy(hidden, torch.zeros(5, 4), two * 0, two, offsets)
    with pytest.raises(ValueError, match=r"groups: expected ids in \[0, 2\), got 2"):
        group_cross_entropy(hidden, torch.zeros(5, 4), two + 1, two, offsets)
    with pytest.raises(ValueError, match=r"weight: expected \[T, 4\] \(with offsets\), got \[5, 1, 4\]"):
        group_cross_entropy(hidden, torch.zeros(5, 1, 4), two, two, offsets)
    with pytest.raises(ValueError, match=r"weight: expected \[K, m, 4\], got \[5, 4\]"):
        group_cross_entropy(hidden, torch.zeros(5, 4), two, two)


@pytest.mark.parametrize("shape", [(15,), (2, 3, 15)])
def test_group_logsumexp(shape):
    torch.manual_seed(0)
    scores = (torch.randn(shape) * 50).requires_grad_()
    blocks = scores.split([1, 4, 2, 6, 2], -1)
    plain = torch.stack([block.logsumexp(-1) for block in blocks], -1)
    got = group_logsumexp(scores, OFFSETS)
    close(got, plain)
    scale = torch.rand(got.shape)
    for a, b in zip(*(torch.autograd.grad((x * scale).sum(), scores) for x in (got, plain)), strict=True):
        close(a, b)
    assert group_logsumexp(torch.full((15,), -torch.inf), OFFSETS).eq(-torch.inf).all()


@pytest.mark.usefixtures("tiles")
def test_losses_pass_gradcheck():
    torch.manual_seed(0)
    hidden, rows, groups = (torch.randn(*s, 4, dtype=torch.float64, requires_grad=True) for s in ((7,), (9,), (3, 2)))
    targets, group = torch.tensor([0, 8, -100, 3, 3, 1, 7]), torch.tensor([0, 1, 2, 2, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, [w[:2], w[2:]], targets), (hidden, rows))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, [w[:2], w[2:]], targets, 0.7), (hidden, rows))
    sub = torch.where(targets < 0, targets, targets % 2)
    assert torch.autograd.gradcheck(lambda h, w: group_cross_entropy(h, w, group, sub), (hidden, groups))
    ragged, sub = torch.tensor([0, 1, 5, 9]), torch.tensor([0, 3, -100, 2, 0, 1, 3])
    assert torch.autograd.gradcheck(lambda h, w: group_cross_entropy(h, w, group, sub, ragged), (hidden, rows))


def test_losses_of_no_targets_are_zero():
    hidden, rows = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, [rows], torch.full((3,), -100)).sum()
    loss.backward()
    assert loss == 0 and rows.grad.eq(0).all() and hidden.grad.eq(0).all()
    groups, none = torch.randn(5, 2, 4, requires_grad=True), torch.full((3,), -100)
    loss = group_cross_entropy(hidden, groups, none, none).sum()
    loss.backward()
    assert loss == 0 and groups.grad.eq(0).all() and hidden.grad.eq(0).all()


def test_linear_cross_entropy_follows_autocast():
    torch.manual_seed(0)
    hidden, rows = torch.randn(9, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    targets = torch.randint(30, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, [rows], targets)
        plain = F.cross_entropy((hidden @ rows.T).float(), targets, reduction="none")
    assert losses.dtype == torch.float32
    close(losses, plain)
    assert not torch.equal(losses, linear_cross_entropy(hidden, [rows], targets))  # fp32 differs from bf16
    losses.sum().backward()
    assert hidden.grad.dtype == rows.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": torch.tensor([0, 5])}, r"targets: expected ids in \[0, 5\), got 5"),
        ({"targets": torch.tensor([0, -1])}, r"targets: expected ids in \[0, 5\), got -1"),
        ({"targets": torch.tensor([0])}, r"targets: expected \[2\] of int64, got \[1\]"),
        ({"weights": [torch.zeros(5, 3)]}, r"weights: expected \[V, 4\], got \[5, 3\]"),
        ({"hidden": torch.zeros(2, 1, 4)}, r"hidden: expected \[N, width\]"),
    ],
)
def test_linear_cross_entropy_names_what_is_wrong(change, words):
    arguments = {"hidden": torch.zeros(2, 4), "weights": [torch.zeros(5, 4)], "targets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**{**arguments, **change})


# ---- input ----


@pytest.mark.parametrize("width", [8, 9])
def test_adapter_puts_two_mlps_side_by_side(width):
    torch.manual_seed(0)
    adapter = DualAdapter(6, 4, width)
    sem, pix = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    out = adapter(sem, pix)
    assert out.shape == (2, 3, width)
    half = width - width // 2
    of_sem, of_pix = torch.autograd.grad(out[..., :half].sum(), [sem, pix], allow_unused=True, retain_graph=True)
    assert of_sem.abs().min() > 0 and (of_pix is None or of_pix.eq(0).all())
    of_sem, of_pix = torch.autograd.grad(out[..., half:].sum(), [sem, pix], allow_unused=True)
    assert of_pix.abs().min() > 0 and (of_sem is None or of_sem.eq(0).all())


def test_embed_puts_every_kind_of_id_in_its_place():
    model = small_model()
    image, codes = image_ids(model, 2)
    ids = torch.cat([torch.tensor([[3, 39], [0, 7]]), image], dim=1)
    embedded = model.embed(ids)
    assert torch.equal(embedded[:, :2], model.model.embed_tokens.weight[ids[:, :2]])
    assert torch.equal(embedded[:, 2], model.special_embedding.weight[[0, 0]])
    assert torch.equal(embedded[:, -1], model.special_embedding.weight[[1, 1]])
    features = TOKENIZER.features(codes)
    close(embedded[:, 3:-1], model.adapter(*features).flatten(1, 2))
    # vectors in place of ids: the ids only mark places
    other = torch.where((ids >= TEXT) & (ids < TEXT + 15), TEXT, ids)
    assert torch.equal(model.embed(other, features), embedded)
    assert not torch.equal(model.embed(other), embedded)
    with pytest.raises(
        ValueError, match=r"image_features.semantic: expected 8 vectors of dimension 6, got \[1, 2, 2, 6"
    ):
        model.embed(ids, type(features)(features.semantic[:1], features.pixel))
    with pytest.raises(ValueError, match=r"input_ids: expected ids in \[0, 57\), got 57"):
        model.embed(torch.tensor([[57]]))


def test_gradients_reach_all_new_parts_and_no_codebook():
    for head in HEADS:
        model = small_model(head=head)
        model(**pack(samples(model), 32)._asdict()).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        names = {n.partition(".")[0] for n, _ in model.named_parameters()} - {"model", "text_head"}
        assert names == set(UnifiedMLLM.new_modules(model.config))
        assert not any("codebooks" in name for name, _ in model.named_parameters())


def test_ids_of_another_codebook_are_refused():
    model, other = small_model(), small_tokenizer(1)
    codes = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="codebook_hash: expected ids of codebook"):
        model.vocabulary.image(codes, other.codebook_hash)
    empty = UnifiedMLLM(UnifiedMLLMConfig(llm_config(), 5, 3, 6, 4, 2, 16))
    with pytest.raises(ValueError, match="codebooks"):
        empty(input_ids=torch.tensor([[TEXT]]))


# ---- output ----


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_is_that_of_the_logits(kind, head):
    model = small_model(kind, head)
    image, _ = image_ids(model, 2)
    ids = torch.cat([torch.tensor([[3, 39], [0, 7]]), image, torch.tensor([[1], [2]])], dim=1)
    labels = ids.clone()
    labels[0, :2] = -100
    logits = model(input_ids=ids).logits
    assert logits.shape == (*ids.shape, model.vocabulary.size)
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    out = model(input_ids=ids, labels=labels)
    assert out.logits is None
    close(out.loss, plain)
    mine = torch.autograd.grad(out.loss, list(model.parameters()))
    for a, b in zip(mine, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        close(a, b)
    count = (labels[:, 1:] != -100).sum()
    close(model(input_ids=ids, labels=labels, num_items_in_batch=2 * count).loss, out.loss / 2)
    losses = model(input_ids=ids, labels=labels, reduce=False).loss
    assert losses.shape == labels[:, 1:].flatten().shape and torch.equal(losses.sum() / count, out.loss)
    assert losses[labels[:, 1:].flatten() == -100].eq(0).all()


@pytest.mark.parametrize("head", HEADS[1:])
def test_hierarchical_head_is_code_first_then_its_own_rows(head):
    model = small_model(head=head).double()
    vocabulary = model.vocabulary
    hidden = torch.randn(4, 18, dtype=torch.float64)
    probability = model.logits(hidden).softmax(-1)
    close(probability.sum(-1), torch.ones(4, dtype=torch.float64))
    outer = torch.cat([model.text_head.weight, model.semantic_head.weight, model.special_head.weight])
    outer = (hidden @ outer.T).softmax(-1)
    blocks = model.image_head.weight.flatten(0, 1).split(OFFSETS.diff().tolist() if "adaptive" in head else 3)
    expected = [outer[:, TEXT + i, None] * (hidden @ block.T).softmax(-1) for i, block in enumerate(blocks)]
    expected = torch.cat([outer[:, :TEXT], *expected, outer[:, TEXT + 5 :]], -1)
    torch.testing.assert_close(probability, expected, atol=1e-12, rtol=1e-9)
    # the loss, by every id there is
    ids = torch.arange(vocabulary.size)
    losses = model.token_losses(hidden[:1].expand(len(ids), -1), ids)
    torch.testing.assert_close(losses.neg().exp(), expected[0], atol=1e-12, rtol=1e-9)
    code, sub = vocabulary.split(torch.arange(15))
    assert torch.equal(code, torch.cat([torch.full((len(x),), i) for i, x in enumerate(blocks)]))
    assert torch.equal(vocabulary.flat(code, sub), torch.arange(15))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_are_as_if_alone(kind, attention):
    model = small_model(kind)
    model.set_attn_implementation(attention)
    members = samples(model)
    packed = pack(members, 21, pad_id=2)
    assert len(packed.input_ids) == 2  # two samples share a row
    counts = [int((s.labels[1:] != -100).sum()) for s in members]
    alone = sum(
        model(input_ids=s.input_ids[None], labels=s.labels[None]).loss * n for s, n in zip(members, counts, strict=True)
    ) / sum(counts)
    together = model(**packed._asdict()).loss
    close(together, alone)
    mine = torch.autograd.grad(together, list(model.parameters()))
    for a, b in zip(mine, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        close(a, b)


def test_pack_masks_borders_and_padding():
    first, second = join(([1, 2], False), ([3], True)), join(([4, 5], True))
    packed = pack([first, second], 7, pad_id=9)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 9]]
    assert packed.labels.tolist() == [[-100, -100, 3, -100, 5, -100, -100]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert pack([first, first, second], 5).input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    with pytest.raises(ValueError, match="length: expected at least 3, the length of a sample, got 2"):
        pack([first], 2)


# ---- the LLM, files, LoRA ----


def test_from_parts_keeps_the_language_model():
    torch.manual_seed(0)
    llm = transformers.AutoModelForCausalLM.from_config(llm_config()).eval()
    model = UnifiedMLLM.from_parts(llm, TOKENIZER).eval()
    ids = torch.randint(TEXT, (2, 7))
    close(model(input_ids=ids).logits[..., :TEXT], llm(input_ids=ids).logits)
    assert model.vocabulary.to_text(0) == TEXT
    assert model.vocabulary.codebook_hash == TOKENIZER.codebook_hash
    assert float(model.image_head.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.codebooks.pix, TOKENIZER.quantizer.pix_codebook)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_saving_and_loading_keeps_every_bit(tmp_path, head, tied):
    model = small_model(head=head, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for cls in (UnifiedMLLM, transformers.AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is UnifiedMLLM and loaded.vocabulary == model.vocabulary
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert (loaded.text_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = image_ids(model)[0]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_tokenizer_with_adaptive_sizes(tmp_path):
    model = UnifiedMLLM.from_parts(llm_config(), ADAPTIVE).bfloat16().eval()
    codes = torch.arange(15)
    expected = ADAPTIVE.quantizer.lookup(codes)
    assert all(torch.equal(a, b) for a, b in zip(model.codebooks(codes), expected, strict=True))
    model.save_pretrained(tmp_path)
    loaded = UnifiedMLLM.from_pretrained(tmp_path)  # which checks the hash
    assert torch.equal(loaded.codebooks.offsets, OFFSETS) and loaded.vocabulary.offsets == tuple(OFFSETS.tolist())
    assert all(torch.equal(a, b) for a, b in zip(loaded.codebooks(codes), expected, strict=True))


def test_codebooks_stay_fp32_and_are_checked_on_loading(tmp_path):
    model = small_model().to(torch.bfloat16)
    assert model.codebooks.sem.dtype == torch.float32 and model.text_head.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = UnifiedMLLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.codebooks.sem, TOKENIZER.quantizer.semantic.codebook)
    assert loaded(input_ids=image_ids(model)[0]).logits.dtype == torch.bfloat16
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "codebook_hash": "0" * 64}))
    with pytest.raises(ValueError, match="codebook_hash: expected ids of codebook 000000000000"):
        UnifiedMLLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", HEADS)
def test_lora_trains_through_peft(tmp_path, head):
    peft = pytest.importorskip("peft")
    model = small_model(head=head)
    packed = pack(samples(model), 32)._asdict()
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": UnifiedMLLM.new_modules(model.config)}
    frozen = model.model.layers[0].self_attn.q_proj.weight.clone()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained) and any("image_head" in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    losses = []
    for _ in range(20):
        loss = wrapped(**packed).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    changed = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small_model(head=head), tmp_path)
    close(again(**packed).loss, wrapped.eval()(**packed).loss)
    assert torch.equal(again.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, frozen)


def test_lora_of_a_head_is_refused_not_ignored():
    peft = pytest.importorskip("peft")
    model = small_model()
    packed = pack(samples(model), 32)._asdict()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["text_head"]))
    with pytest.raises(ValueError, match="heads: expected whole weights, got LoRA"):
        wrapped(**packed)


def test_gradient_checkpointing_changes_no_gradient():
    model = small_model().train()
    packed = pack(samples(model), 32)._asdict()
    plain = torch.autograd.grad(model(**packed).loss, list(model.parameters()))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for a, b in zip(torch.autograd.grad(model(**packed).loss, list(model.parameters())), plain, strict=True):
        close(a, b)


def test_bad_configs_and_models_are_refused():
    with pytest.raises(ValueError, match="head: expected one of flat, hierarchical, got 'tall'"):
        UnifiedMLLMConfig(llm_config(), head="tall")
    with pytest.raises(ValueError, match="num_codes: expected a positive integer, got 0"):
        UnifiedMLLMConfig(llm_config(), num_codes=0)
    llm = transformers.AutoModelForCausalLM.from_config(llm_config())
    llm.lm_head = nn.Linear(18, TEXT)
    with pytest.raises(ValueError, match="llm: expected an output head without bias"):
        UnifiedMLLM.from_parts(llm, TOKENIZER)
    with pytest.raises(ValueError, match="input_ids: expected either"):
        small_model()()


def test_the_full_size_model_builds_without_memory():
    config = UnifiedMLLMConfig(qwen2_5_7b(), 24576, 8)
    with torch.device("meta"):
        model = UnifiedMLLM(config)
    table = parameter_table(model)
    assert table["text embedding"] + table["LLM's trunk"] + table["text head"] == 7_615_616_512  # as published
    assert table["image head"] == 196_608 * 3584
    assert sum(table.values()) - table["codebooks"] == sum(p.numel() for p in model.parameters())
    assert config.vocabulary.size == 348_672 + 2
