"""Training of the unified model: stages, exact resume, several processes, LoRA, the command."""

import itertools
import json
import signal
import time

import pytest
import torch
from mllm_runs import SETTINGS, finish, losses, small_config, small_tokenizer, start, write_jsonl, write_world

transformers = pytest.importorskip("transformers")

from mllm_small import write_pictures  # noqa: E402

from semhitok.config import preset_names  # noqa: E402
from semhitok.mllm import Sampling, UnifiedMLLM, generate, generate_images, prompts  # noqa: E402
from semhitok.mllm.config import TASKS, mllm_config  # noqa: E402
from semhitok.mllm.rows import TrainingRows  # noqa: E402
from semhitok.mllm.sources import Records  # noqa: E402
from semhitok.mllm.training import ImageEncoder, MLLMStage, RowBatch, train  # noqa: E402
from semhitok.training import checkpoint, log, loop, workers  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert finish(start(1, world, out, ["joint.steps=30"])) == [0]
    return out


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    monkeypatch.setattr(log, "LOG_EVERY", 1)


def weights(run):
    return (run / "checkpoint" / "model.safetensors").read_bytes()


def untrained(config):
    """The model that a run starts from."""
    tokenizer, llm = small_tokenizer(), transformers.AutoConfig.for_model(**config.llm_config)
    torch.manual_seed(config.seed)
    return UnifiedMLLM.from_parts(llm, tokenizer, head=config.head)


def parts_of(world, *more):
    """Model, rows and image tokenizer of a run."""
    config = small_config(world, *more)
    model, tokenizer = untrained(config), small_tokenizer()
    records = [json.loads(line) for line in (world / "captioned.jsonl").read_text().splitlines()]
    texts = [json.loads(line) for line in (world / "texts.jsonl").read_text().splitlines()]
    words = prompts.word_tokenizer([*(r["caption"] for r in records), *(r["text"] for r in texts)])
    sources = [Records(records, "understanding"), Records(records, "generation"), Records(texts, "text")]
    images = ImageEncoder(config.tokenizer, tokenizer, torch.device("cpu"))
    return config, model, TrainingRows(sources, config.data, model.config, words, 0), images


# ---- what is learnt ----


def test_it_learns_and_the_result_loads_by_itself(finished):
    for key in ("loss", *(f"{task}_loss" for task in TASKS)):
        values = losses(finished, key=key)
        assert len(values) >= 25 and sum(values[-5:]) < 0.9 * sum(values[:5])
    model = UnifiedMLLM.from_pretrained(finished / "checkpoint").eval()
    words = transformers.AutoTokenizer.from_pretrained(finished / "checkpoint")
    vocabulary = model.vocabulary
    assert vocabulary.codebook_hash == small_tokenizer().codebook_hash
    codes = generate_images(
        model, [prompts.generation(words, vocabulary, "a red thing")], sampling=Sampling(guidance=2.0),
        unconditional=prompts.generation(words, vocabulary, None),
    )  # fmt: skip
    assert codes.shape == (1, 2, 2)
    image = vocabulary.image(codes, vocabulary.codebook_hash)[0]
    asked = prompts.understanding(words, vocabulary, image, "what colour is it ?")
    end = prompts.end_of_answer(words, vocabulary)
    text = generate(model, [asked], max_new_tokens=5, images=False, eos_id=end, num_text_ids=len(words))
    assert isinstance(words.decode(text[0]), str)


@pytest.mark.parametrize("more", [(), ("gradient_checkpointing=true", "head=flat")], ids=["plain", "checkpointed"])
def test_packed_rows_give_the_losses_and_gradients_of_their_samples_alone(world, more):
    config, model, data, images = parts_of(world, *more)
    stage = MLLMStage("joint", model, config, images)
    micro = next(data.batches(4, 2))
    batch = stage.to_device(micro)
    for part in stage.parts:
        part.optimizer = torch.optim.SGD(part.module.parameters(), 0.1)
        part.parameters = list(part.module.parameters())
        part.config.grad_clip = 1e9
    figures, _ = stage.backward(batch, 0)
    mine = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sums, counts = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    several = 0
    for m in micro:
        for ids, labels, positions, tasks in zip(*m.packed, m.tasks, strict=True):
            starts = [*positions.eq(0).nonzero().flatten().tolist(), len(ids)]
            several += len(starts) > 3
            for first, last in itertools.pairwise(starts):
                count = int((labels[first:last] >= 0).sum())
                if count:
                    out = model(input_ids=ids[None, first:last], labels=labels[None, first:last], num_items_in_batch=1)
                    (out.loss / sum(batch[0].counts)).backward()
                    sums[int(tasks[first])] += out.loss.detach()
                    counts[int(tasks[first])] += count
    assert several and counts.tolist() == batch[0].counts
    assert float(figures["loss"]) == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-5)
    for task, total, count in zip(TASKS, sums, counts, strict=True):
        assert float(figures[f"{task}_loss"]) == pytest.approx(float(total / count), abs=1e-5)
    for a, p in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-5)


def test_the_adapter_stage_leaves_the_language_model_as_it_is(world, tmp_path):
    config = small_config(world, "stages=[adapter]", "adapter.steps=4", "adapter.batch_size=2")
    train(config, tmp_path)
    before = untrained(config).state_dict()
    after = UnifiedMLLM.from_pretrained(tmp_path / "checkpoint")
    new = set(UnifiedMLLM.new_modules(after.config))
    changed = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in changed} == new
    assert len(changed) == sum(name.partition(".")[0] in new for name in before)
    assert "model.embed_tokens.weight" not in changed


def test_stages_follow_each_other_and_the_joint_stage_trains_everything(world, tmp_path):
    small = ["adapter.steps=2", "adapter.batch_size=2", "joint.steps=2", "instruct.steps=2", "instruct.batch_size=2"]
    seconds = train(small_config(world, "stages=[adapter, joint, instruct]", *small), tmp_path)
    assert list(seconds) == ["adapter", "joint", "instruct"]
    states = [checkpoint.read_state(tmp_path / stage / "step-00000002.pt") for stage in seconds]
    kept, joint, last = (state["parts"]["network"]["weights"] for state in states)
    assert kept.keys() < joint.keys() == last.keys()
    frozen = {n for n in joint if "codebooks" in n}
    for name, tensor in joint.items():
        assert torch.equal(tensor, last[name]) == (name in frozen), name
    model = UnifiedMLLM.from_pretrained(tmp_path / "checkpoint")
    assert all(torch.equal(tensor, last[f"model.{name}"]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stages", ["[joint]", "[adapter, joint]"])
def test_lora_trains_and_the_result_loads_without_it(world, tmp_path, stages):
    pytest.importorskip("peft")
    more = ["lora={r: 2, alpha: 4, targets: [q_proj, v_proj]}", "adapter.steps=2", "adapter.batch_size=2"]
    config = small_config(world, f"stages={stages}", *more)
    train(config, tmp_path / "run")
    values = losses(tmp_path / "run")
    assert values[-1] < 0.97 * values[0]
    saved = checkpoint.read_state(tmp_path / "run" / "joint" / "step-00000012.pt")["parts"]["network"]["weights"]
    assert any("lora_A" in name for name in saved) and not any("embed_tokens" in name for name in saved)
    before = untrained(config).state_dict()
    after = UnifiedMLLM.from_pretrained(tmp_path / "run" / "checkpoint").state_dict()
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    new = set(UnifiedMLLM.new_modules(UnifiedMLLM.from_pretrained(tmp_path / "run" / "checkpoint").config))
    expected = {n for n in before if n.partition(".")[0] in new or "q_proj.weight" in n or "v_proj.weight" in n}
    assert changed == expected
    # the rest of the stages' folders is there: the same call trains nothing and saves the same
    first = weights(tmp_path / "run")
    train(config, tmp_path / "run")
    assert weights(tmp_path / "run") == first


def test_pictures_on_the_fly_train_as_their_ids_do(world, tmp_path):
    ids = write_pictures(tmp_path / "pictures", 6)
    by_file = [{"caption": f"a thing number {n}", "images": [f"pictures/{n}.png"]} for n in range(6)]
    by_ids = [{"caption": f"a thing number {n}", "codes": [ids[n]]} for n in range(6)]
    write_jsonl(tmp_path / "pictures.jsonl", by_file)
    own = f"joint.sources=[{{path: {tmp_path}/pictures.jsonl, task: generation}}]"
    train(small_config(world, own, "joint.steps=3"), tmp_path / "files")
    stored = Records(by_ids, "generation", codebook_hash=small_tokenizer().codebook_hash)
    train(small_config(world, "joint.steps=3"), tmp_path / "ids", sources={"joint": [stored]})
    assert weights(tmp_path / "files") == weights(tmp_path / "ids")


# ---- stopped and continued ----


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(world, finished, tmp_path):
    log = tmp_path / "joint" / "log.jsonl"
    for lines in (3, 9, 14, 20):
        (process,) = start(1, world, tmp_path, ["joint.steps=30"])
        # What came after the last checkpoint is lost, and logged again.
        while process.is_alive() and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert finish(start(1, world, tmp_path, ["joint.steps=30"])) == [0]
    assert weights(tmp_path) == weights(finished)
    assert (tmp_path / "joint" / "log.jsonl").read_bytes() == (finished / "joint" / "log.jsonl").read_bytes()


def test_a_run_stopped_by_signals_goes_on_with_the_same_bits(world, tmp_path, monkeypatch):
    more = ["stages=[adapter, joint]", "adapter.steps=3", "adapter.batch_size=2", "joint.steps=4", "precision=bf16"]
    train(small_config(world, *more), tmp_path / "whole")
    real = loop.seed_everything
    stops = 0
    for _ in range(6):
        calls = itertools.count()

        def stop(*key, calls=calls):
            real(*key)
            if next(calls) == 1:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(loop, "seed_everything", stop)
        try:
            train(small_config(world, *more), tmp_path / "stopped")
        except loop.Interrupted:
            stops += 1
    assert stops == 3  # after step 2 of adapter, 1 and 3 of joint
    monkeypatch.undo()
    train(small_config(world, *more), tmp_path / "stopped")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_a_loss_that_is_not_finite_leaves_its_rows(world, tmp_path, monkeypatch):
    loss = MLLMStage.loss

    def broken(stage, batch: RowBatch, step):
        value, figures, output = loss(stage, batch, step)
        return value * (torch.nan if step == 2 else 1), figures, output

    monkeypatch.setattr(MLLMStage, "loss", broken)
    with pytest.raises(FloatingPointError, match="joint: not finite at step 2"):
        train(small_config(world), tmp_path)
    (path,) = (tmp_path / "joint").glob("not-finite-step-2-process-0.pt")
    found = torch.load(path, weights_only=True)
    assert found["input_ids"].shape == found["labels"].shape == (4, 64)


def test_another_run_in_the_folder_is_refused(world, tmp_path):
    train(small_config(world, "joint.steps=1"), tmp_path)
    with pytest.raises(ValueError, match=r"holds another run: train.joint.steps was 1, now 2"):
        train(small_config(world, "joint.steps=2"), tmp_path)
    train(small_config(world, "joint.steps=2"), tmp_path, accept_changes=True)
    with pytest.raises(ValueError, match=r"holds another model: model.codebook_hash was"):
        train(small_config(world, "joint.steps=2"), tmp_path, image_tokenizer=small_tokenizer(1), accept_changes=True)


# ---- several processes ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("joint.micro_batch=1",), ("shard=true",)], ids=["replicated", "accumulated", "sharded"]
)
def test_two_processes_lose_what_one_does(world, finished, tmp_path, more):
    assert finish(start(2, world, tmp_path, ["joint.steps=30", *more])) == [0, 0]
    for key in ("loss", "generation_loss", "padding"):
        one, two = losses(finished, key=key), losses(tmp_path, key=key)
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert len(losses(tmp_path)) == 30
    mine, other = (UnifiedMLLM.from_pretrained(r / "checkpoint").state_dict() for r in (tmp_path, finished))
    for name, tensor in other.items():
        torch.testing.assert_close(mine[name], tensor, atol=2e-3, rtol=1e-3)


# ---- other models, held-out samples ----


def test_a_language_model_with_its_tokenizer_and_template(world, tmp_path):
    words = prompts.word_tokenizer(["a red thing number what colour is it please user assistant"])
    words.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    sizes = {**small_config(world).llm_config, "vocab_size": 70}  # more rows than words, as in Qwen2.5
    kind = sizes.pop("model_type")
    torch.manual_seed(3)
    llm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    llm.to(torch.bfloat16).save_pretrained(tmp_path / "llm")
    words.save_pretrained(tmp_path / "llm")
    more = ["llm_config=null", f"llm={tmp_path}/llm", "stages=[adapter]", "adapter.steps=2", "adapter.batch_size=2"]
    train(small_config(world, *more), tmp_path / "run")
    model = UnifiedMLLM.from_pretrained(tmp_path / "run" / "checkpoint")
    assert model.vocabulary.text_size == 70 and model.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, llm.get_input_embeddings().weight.float())
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint")
    assert kept.chat_template == words.chat_template and len(kept) == len(words)
    again = ["llm_config=null", f"start_from={tmp_path}/run/checkpoint", "stages=[instruct]", "instruct.steps=1"]
    train(small_config(world, *again, "instruct.batch_size=2"), tmp_path / "more")
    assert UnifiedMLLM.from_pretrained(tmp_path / "more" / "checkpoint").vocabulary == model.vocabulary


def test_held_out_losses_are_logged(world, tmp_path):
    held = f"evaluation={{sources: [{{path: {world}/talks.jsonl, task: understanding}}], every: 2, batches: 3}}"
    train(small_config(world, held, "joint.steps=5"), tmp_path)
    found = losses(tmp_path, key="held_out_understanding_loss")
    assert len(found) == 3 and found[-1] < found[0]
    assert found == losses(tmp_path, key="held_out_loss")


def test_settings_that_contradict_each_other_are_refused(world, tmp_path):
    for more, words in (
        (["llm=a"], "llm: expected one of start_from, llm and llm_config, got llm and llm_config"),
        (["joint.sources=[]"], "joint.sources: expected at least one, got none"),
        (["tokenizer=''"], "tokenizer: expected the folder or Hub name of an image tokenizer, got none"),
    ):
        with pytest.raises(ValueError, match=words):
            train(small_config(world, "text_tokenizer=null", *more), tmp_path, text_tokenizer=object())
    with pytest.raises(ValueError, match="stages: expected some of adapter, joint, instruct, in this order"):
        small_config(world, "stages=[joint, adapter]")


# ---- the command ----


def test_every_preset_is_read():
    assert preset_names("mllm") == ["mllm-qwen2.5-0.5b", "mllm-tiny"]
    for name in preset_names("mllm"):
        config = mllm_config(name)
        assert (config.llm is None) != (config.llm_config is None)
    with pytest.raises(ValueError, match=r"preset: expected one of mllm-qwen2.5-0.5b, mllm-tiny, or a .yaml file"):
        mllm_config("semhitok-tiny")


def test_the_command_trains_the_stages_it_is_told(world, tmp_path, run):
    settings = small_config(world, "joint.steps=2")
    sources = json.dumps([vars(s) for s in settings.joint.sources])
    more = [*SETTINGS, "joint.steps=2", f"tokenizer={world}/tokenizer", f"joint.sources={sources}"]
    flags = [part for setting in more for part in ("--set", setting)]
    code, out, err = run("train-mllm", "mllm-tiny", "joint", "--out", tmp_path, "--device", "cpu", *flags)
    assert code == 0, err
    assert "stage joint" in out and f"{tmp_path}/checkpoint" in out
    assert UnifiedMLLM.from_pretrained(tmp_path / "checkpoint").config.num_codes == 5
    (tmp_path / "texts.jsonl").write_text('{"text": "a dog"}\n{broken\n')
    more = ["--set", f"joint.sources=[{{path: {tmp_path}/texts.jsonl, task: text}}]", "--set", "data.workers=0"]
    code, out, err = run(
        "train-mllm", "mllm-tiny", "joint", "--out", tmp_path / "bad", "--device", "cpu", *flags, *more
    )
    assert code == 3 and "1 record, named on stderr" in out
    assert sum("record 2: not JSON" in line for line in err) == 1  # the text tokenizer is made of them, too
    code, out, _ = run("train-mllm", "mllm-tiny", "instruct", "--print-config", *flags)
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    assert code == 0 and mllm_config(printed).stages == ["instruct"]
    assert mllm_config(printed).joint == mllm_config(printed).joint and "caption_drop: 0.1" in out
    code, _, err = run("train-mllm", "mllm-tiny", "joint", *flags)
    assert code == 2 and "--out: expected" in err[-1]
    code, _, err = run("train-mllm", "mllm-tiny", "pixel", "--out", tmp_path, *flags)
    assert code == 2 and "stages: expected some of adapter, joint, instruct" in err[-1]


def test_the_machine_uses_as_many_processes_as_divide_the_rows(world, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "of_machine", lambda device: 3)
    config = small_config(world, "stages=[joint]", "joint.steps=2")
    train(config, tmp_path / "run")
    kept = json.loads((tmp_path / "run/config.json").read_text())["train"]["data"]["workers"]
    assert config.joint.batch_size == 4 and kept == 2 and config.data.workers == "auto"
    train(small_config(world, "stages=[joint]", "joint.steps=2", "data.workers=0"), tmp_path / "alone")
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")
    monkeypatch.setattr(workers, "of_machine", lambda device: 8)
    train(config, tmp_path / "run")  # on another machine: still the same run
