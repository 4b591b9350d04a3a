"""LLMs of many families: their logits, tied weights, sizes; and the model under `torch.export`."""

import copy

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from mllm_small import HEADS, TEXT, TOKENIZER, image_ids, llm_config, small_model  # noqa: E402

from semhitok.mllm import UnifiedMLLM, generate  # noqa: E402
from semhitok.mllm.output import OutputRule, output_rule  # noqa: E402

FAMILIES = {
    "llama": {}, "qwen2": {}, "gpt2": {}, "opt": {"ffn_dim": 32, "word_embed_proj_dim": 24},
    "gemma": {"head_dim": 12}, "gemma2": {"head_dim": 12, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "minicpm3": {"dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                 "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 2},
}  # fmt: skip


def family(kind, **changes):
    """A small LLM of a family whose logits are far from 0, and those of some ids."""
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    try:
        config = llm_config(kind, **{**sizes, **FAMILIES.get(kind, {}), **changes})
    except (ValueError, KeyError):
        pytest.skip(f"this transformers has no {kind}")
    llm = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        return llm, llm(torch.tensor([[3, 5, 7, 9, 11]])).logits


@pytest.mark.parametrize("head", ["flat", "hierarchical"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_text_logits_are_those_of_the_llm_and_the_loss_is_theirs(kind, head, tmp_path):
    llm, expected = family(kind)
    model = UnifiedMLLM.from_parts(copy.deepcopy(llm), TOKENIZER, head=head).eval()
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    torch.testing.assert_close(model(ids).logits[..., :TEXT], expected, atol=1e-5, rtol=1e-5)
    embedding = model.get_input_embeddings().weight
    assert (model.text_head.weight is embedding) == llm.config.tie_word_embeddings
    image, _ = image_ids(model)
    mixed = torch.cat([ids, image, ids], dim=1)
    logits = model(mixed).logits
    loss = model(mixed, labels=mixed).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :-1], mixed[0, 1:]), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = UnifiedMLLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(mixed).logits, logits)
    assert (loaded.text_head.weight is loaded.get_input_embeddings().weight) == llm.config.tie_word_embeddings


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_capped_and_scaled_losses_are_those_of_the_logits(head):
    model = small_model("qwen2", head)
    model.rule = OutputRule(1.5, 2.0)
    image, _ = image_ids(model, 2)
    ids = torch.cat([torch.tensor([[3, 5], [7, 9]]), image], dim=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_logits = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    got = torch.autograd.grad(model(ids, labels=ids).loss, parameters, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(by_logits, parameters, allow_unused=True), strict=True):
        a, b = (torch.zeros(1) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b.expand_as(a), atol=1e-5, rtol=1e-4)


def test_rules_are_read_from_configurations_and_kept_with_the_model():
    assert output_rule(llm_config("qwen2")) == OutputRule(1.0, None)
    assert output_rule(family("gemma2")[0].config) == OutputRule(1.0, 3.0)
    assert output_rule(family("granite")[0].config) == OutputRule(0.25, None)
    config = UnifiedMLLM.from_parts(family("gemma2")[0], TOKENIZER).config
    assert (config.logit_scale, config.logit_softcap) == (1.0, 3.0)
    # a model from before there were rules keeps the logits it was trained with
    old = {k: v for k, v in config.to_dict().items() if not k.startswith("logit_")}
    assert UnifiedMLLM(type(config)(**old)).rule == OutputRule(1.0, None)


def test_llms_with_other_logits_are_refused_by_name():
    llm, _ = family("llama")
    wrapped = llm.forward

    def forward(*arguments, **options):
        output = wrapped(*arguments, **options)
        output.logits = output.logits * 1.3
        return output

    llm.forward = forward
    with pytest.raises(ValueError, match=r"llm: expected logits that are hidden states times .* LlamaForCausalLM"):
        UnifiedMLLM.from_parts(llm, TOKENIZER)
    llm, _ = family("recurrent_gemma", lru_width=24, attention_window_size=16, num_hidden_layers=3, head_dim=12)
    with pytest.raises(ValueError, match=r"llm: expected one that keeps keys and values .* RecurrentGemmaForCausalLM"):
        UnifiedMLLM.from_parts(llm, TOKENIZER)
    llm, _ = family("opt", word_embed_proj_dim=12)
    with pytest.raises(ValueError, match=r"llm: expected embeddings as wide as hidden states, 24, got 12 in OPTFor"):
        UnifiedMLLM.from_parts(llm, TOKENIZER)


def test_building_draws_no_number_and_changes_no_mode():
    for training in (False, True):
        llm = family("llama", attention_dropout=0.5)[0].train(training)
        llm.model.layers[0].train(not training)
        modes = [module.training for module in llm.modules()]
        model = UnifiedMLLM.from_parts(llm, TOKENIZER)
        assert [module.training for module in llm.modules()] == modes and model.model is llm.model


def test_resizing_is_refused_before_anything_changes():
    model = small_model()
    ids = torch.tensor([[3, 5, 7]])
    logits, state = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    for arguments in ((TEXT + 2,), (TEXT - 1,), (None, 64), (TEXT, 32)):
        with pytest.raises(ValueError, match=rf"new_num_tokens: expected {TEXT}, since image ids follow the text ids"):
            model.resize_token_embeddings(*arguments)
        assert model.config.text_config.vocab_size == TEXT and torch.equal(model(ids).logits, logits)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for arguments in ((), (TEXT,), (None, 8)):
        assert model.resize_token_embeddings(*arguments) is model.get_input_embeddings()


@pytest.mark.parametrize("head", HEADS)
def test_the_forward_pass_exports_with_any_batch_and_length(head):
    model = small_model("llama", head)
    image, codes = image_ids(model, 2)
    ids = torch.cat([torch.tensor([[3, 4], [5, 6]]), image, torch.tensor([[7], [8]])], dim=1)
    shapes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=100)}
    exported = torch.export.export(model, (ids,), dynamic_shapes={"input_ids": shapes}, strict=False).module()
    for given in (ids, ids[:1, :5], torch.cat([ids, ids[:, :3]], dim=1), torch.tensor([[1, 2, 3]])):
        torch.testing.assert_close(exported(given).logits, model(given).logits, atol=1e-5, rtol=1e-5)
    features = {"input_ids": ids, "image_features": TOKENIZER.features(codes)}
    if head != HEADS[2]:
        exported = torch.export.export(model, (), features, strict=False).module()
        torch.testing.assert_close(exported(**features).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_prompts_beyond_the_positions_are_named():
    model = small_model(max_position_embeddings=32)
    assert len(generate(model, [[3] * 22], max_new_tokens=10, images=False)[0]) == 10
    problem = r"prompts: expected at most 22 ids, which leave 10 of the model's 32 positions for new ones, got 23"
    with pytest.raises(ValueError, match=problem):
        generate(model, [[3], [3] * 23], max_new_tokens=10)
    with pytest.raises(ValueError, match="prompts: expected at most 0 ids"):
        generate(model, [[3]], max_new_tokens=40)
