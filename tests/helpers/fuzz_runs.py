"""What the fuzz run reads besides pictures: records, ids, configurations, tokenizers, corpora and training runs."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import mutations
import torch
import yaml
from fuzz_kinds import (
    COUNT,
    PICTURES,
    SIZE,
    Kind,
    Wrong,
    WrongPairing,
    caption,
    check_pair,
    check_problem,
    number_of,
    picture,
)
from small_tokenizers import adaptive_tokenizer, small_config

from semhitok.cli import main
from semhitok.config import PRESETS, TrainConfig, override, train_config
from semhitok.corpus import EncodedCorpus, EncodingConfig, encode_corpus, load_codes, save_codes, verify
from semhitok.data.skipped import Skipped
from semhitok.mllm import prompts
from semhitok.mllm.config import RowsConfig, SourceConfig, mllm_config
from semhitok.mllm.rows import TrainingRows
from semhitok.mllm.sources import open_source
from semhitok.tokenizer import SemHiTok
from semhitok.training import train
from semhitok.vocabulary import Vocabulary

HASH = "0123456789abcdef" * 4
VOCABULARY = Vocabulary(COUNT, 1, codebook_hash=HASH)
CODES = (torch.arange(COUNT)[:, None] + torch.arange(4)).remainder(COUNT).view(COUNT, 2, 2)  # of image n: n, n + 1, ...


def check_command(*arguments: Any) -> None:
    """Runs a command on what could be read: its exit code must be 0."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(argument) for argument in arguments])
    if code not in (0, 2):
        raise Wrong(f"semhitok {arguments[0]}: exit code {code}: {err.getvalue()}")


class Records(Kind):
    """JSONL files of conversations, captions and texts, with images in files or as ids."""

    weight = 2.5

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "records.jsonl"
        records: list[dict[str, Any]] = []
        for n, data in enumerate(PICTURES):
            name = f"{caption(n).replace(' ', '-')}.png"  # the name has the checksum, too
            (folder / name).write_bytes(data)
            answer = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": caption(n)}]
            ids = {"codes": [[[n, n], [n, n]]], "codebook_hash": HASH}
            records.append({"images": [name], "caption": caption(n)})
            records.append({"images": [name], "messages": answer})
            records.append({**ids, "caption": caption(n)} if n % 2 else {**ids, "messages": answer})
            records.append({"text": caption(n)})
        self.records = records
        text_tokenizer = prompts.word_tokenizer([caption(n) for n in range(COUNT)] + ["what ?"])
        model = SimpleNamespace(
            vocabulary=Vocabulary(COUNT, 1, len(text_tokenizer) + 4, HASH), image_size=SIZE, grid_size=2,
            resolution_id=False,
        )  # fmt: skip
        text = open_source(self._source(self._write(records)), RowsConfig())
        self.rows = TrainingRows([text], RowsConfig(), model, text_tokenizer, 0)  # type: ignore[arg-type]

    def _write(self, records: list[Any]) -> Path:
        self.path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return self.path

    def _source(self, path: Path) -> SourceConfig:
        return SourceConfig(str(path), "understanding")

    def intact(self) -> Iterator[Callable[[], None]]:
        self._write(self.records)
        self.paired = True
        yield self.read
        with contextlib.suppress(StopIteration):
            if next(self._skipped()):
                raise Wrong("an intact record was left out")

    def make(self, random: Random) -> Path:
        lines = random.sample(self.records, 5)
        self.paired = True
        if random.random() < 0.6:
            damaged = [mutations.damage_value(r, random) if random.random() < 0.5 else r for r in lines]
            data = b"\n".join(mutations.dump(record, random) for record in damaged)
        else:
            data, other = ("\n".join(map(json.dumps, part)).encode() for part in (lines, self.records))
            data, moved = mutations.damage(data, other, random)
            self.paired = not moved
        self.path.write_bytes(data)
        return self.path

    def read(self) -> None:
        for _ in self._skipped():
            pass

    def _skipped(self) -> Iterator[str]:
        source: Any = open_source(self._source(self.path), RowsConfig())
        list(source.texts(Skipped()))
        for record, _ in islice(source.stream(0, 1, 0, None), len(source.records)):
            try:
                samples = self.rows.samples(source, record, False)
            except (ValueError, OSError) as error:
                check_problem(str(error), self.path if isinstance(error, ValueError) else self.folder)
                yield str(error)
                continue
            for sample in samples:
                ids = (sample.sample.input_ids - self.rows.vocabulary.text_size).tolist()
                numbers = [number_of(pixels.float() / 255) for pixels, _ in sample.images]
                numbers += [i for i in ids if 0 <= i < COUNT and not sample.images]
                text = self.rows.text_tokenizer.decode(
                    sample.sample.input_ids[sample.sample.input_ids < self.rows.vocabulary.text_size]
                )
                if self.paired and len(set(numbers)) == 1:
                    check_pair(numbers[0], text)


class Captions(Kind):
    """Files of captions beside an ids file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "captions.json"
        save_codes(folder / "a.safetensors", CODES, [f"{n}.png" for n in range(COUNT)], VOCABULARY)
        self.captions = {f"{n}.png": caption(n) for n in range(COUNT)}

    def intact(self) -> Iterator[Callable[[], None]]:
        self.path.write_text(json.dumps(self.captions))
        self.paired = True
        yield self.read

    def make(self, random: Random) -> Path:
        data = json.dumps(self.captions).encode()
        if random.random() < 0.6:
            data, self.paired = mutations.dump(mutations.damage_value(self.captions, random), random), False
        else:
            data, moved = mutations.damage(data, data, random)
            self.paired = not moved
        self.path.write_bytes(data)
        return self.path

    def read(self) -> None:
        config = SourceConfig(str(self.folder / "a.safetensors"), "understanding", captions=str(self.path))
        source: Any = open_source(config, RowsConfig())
        list(source.texts(Skipped()))
        for record, _ in islice(source.stream(0, 1, 0, None), len(source.records)):
            if self.paired and not isinstance(record, ValueError):
                check_pair(int(record["codes"][0][0, 0]), record["caption"])


class Settings(Kind):
    """YAML files of training configurations."""

    weight = 2.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "config.yaml"
        self.files = [path.read_bytes() for path in sorted(PRESETS.glob("*.yaml"))]

    def intact(self) -> Iterator[Callable[[], None]]:
        for data in self.files:
            yield lambda data=data: (self.path.write_bytes(data), self.read())

    def make(self, random: Random) -> Path:
        data, other = random.sample(self.files, 2)
        kind = random.random()
        if kind < 0.5:
            changed = mutations.damage_value(yaml.safe_load(data), random)
            data = mutations.dump(changed, random) if kind < 0.25 else mutations.dump_yaml(changed)
        elif kind < 0.7:
            data = mutations.insert_yaml(data, random)
        else:
            data = mutations.damage(data, other, random).data
        self.path.write_bytes(data)
        return self.path

    def read(self) -> None:
        errors = []
        for load in (train_config, mllm_config):
            try:
                config: Any = load(str(self.path))
                yaml.safe_dump(config.to_dict(), sort_keys=False)  # as --print-config does
            except (ValueError, OSError) as error:
                check_problem(str(error), self.path)
                errors.append(error)
        if len(errors) == 2:
            raise errors[0]


def damage_safetensors(data: bytes, other: bytes, random: Random) -> mutations.Damaged:
    """Damage to the bytes of a safetensors file or to the JSON of its header."""
    if random.random() < 0.5:
        return mutations.damage(data, other, random)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = mutations.dump(mutations.damage_value(json.loads(data[8:end]), random), random)
    return mutations.Damaged(struct.pack("<Q", len(header)) + header + data[end:], True)


class Ids(Kind):
    weight = 1.5

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "ids.safetensors"
        names = [caption(n) for n in range(COUNT)]
        adaptive = Vocabulary(4, 2, codebook_hash=HASH, offsets=(0, 1, 4, 7, 8))
        self.files = []
        for vocabulary in (VOCABULARY, adaptive):
            save_codes(self.path, CODES, names, vocabulary)
            self.files.append(self.path.read_bytes())

    def intact(self) -> Iterator[Callable[[], None]]:
        self.paired = True
        for data in self.files:
            yield lambda data=data: (self.path.write_bytes(data), self.read())

    def make(self, random: Random) -> Path:
        data, moved = damage_safetensors(*random.sample(self.files, 2), random)
        self.paired = not moved
        self.path.write_bytes(data)
        return self.path

    def read(self) -> None:
        file = load_codes(self.path)
        check_command("info", self.path)
        file.vocabulary.check(file.codes)
        for codes, name in zip(file.codes, file.names, strict=True):
            if self.paired and codes.shape == (2, 2) and torch.equal(codes, CODES[int(codes[0, 0]) % COUNT]):
                check_pair(int(codes[0, 0]), name)


class Tokenizers(Kind):
    """Checkpoints of tokenizers."""

    weight = 0.8

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(0)
        self.path, self.files = folder, []
        for tokenizer in (SemHiTok(small_config()), adaptive_tokenizer()):
            tokenizer.save_pretrained(folder)
            self.files.append({name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")})

    def _write(self, file: dict[str, bytes]) -> None:
        for name, data in file.items():
            (self.folder / name).write_bytes(data)

    def intact(self) -> Iterator[Callable[[], None]]:
        self.teacher = True
        for file in self.files:
            yield lambda file=file: (self._write(file), self.read())

    def make(self, random: Random) -> Path:
        file, other = random.sample(self.files, 2)
        name = random.choice(("config.json", "config.json", "model.safetensors"))
        if name == "model.safetensors":
            damaged = damage_safetensors(file[name], other[name], random).data
        elif random.random() < 0.7:
            damaged = mutations.dump(mutations.damage_value(json.loads(file[name]), random), random)
        else:
            damaged = mutations.damage(file[name], other[name], random).data
        self._write({**file, name: damaged})
        self.teacher = random.random() < 0.7
        return self.folder / name

    def read(self) -> None:
        tokenizer = SemHiTok.from_pretrained(self.folder, teacher=self.teacher)
        grid = tokenizer.config.grid_size
        tokenizer.decode(torch.zeros(1, grid, grid, dtype=torch.int64))


class Corpora(Kind):
    """Finished corpora, read, and unfinished ones, resumed."""

    weight = 1.0
    resume = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(0)
        SemHiTok(small_config()).save_pretrained(folder / "checkpoint")
        (folder / "photos").mkdir()
        for n in range(COUNT):
            picture(n, 32).save(folder / "photos" / f"{n}.png")
            (folder / "photos" / f"{n}.txt").write_text(caption(n))
        (folder / "photos" / "broken.png").write_bytes(PICTURES[0][:40])
        self.out, self.config = folder / "corpus", EncodingConfig(batch_size=4, images_per_shard=4)
        self._encode()
        self.files = {path.name: path.read_bytes() for path in self.out.iterdir()}
        self.rows = self._rows()

    def _encode(self) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            encode_corpus(self.folder / "checkpoint", [self.folder / "photos"], self.out, self.config)

    def _rows(self) -> dict[str, tuple[Any, str]]:
        rows = [(row.key, (row.ids.tolist(), row.caption)) for row in EncodedCorpus(self.out, shuffle_buffer=3)]
        if len(dict(rows)) != len(rows):
            raise Wrong(f"keys that repeat: {[key for key, _ in rows]}")
        return dict(rows)

    def intact(self) -> Iterator[Callable[[], None]]:
        self._write({})
        yield self.read

    def _write(self, changed: dict[str, bytes | None]) -> None:
        shutil.rmtree(self.out)
        self.out.mkdir()
        for name, data in {**self.files, **changed}.items():
            if data is not None:
                (self.out / name).write_bytes(data)

    def make(self, random: Random) -> Path:
        name = random.choice(sorted(self.files) if self.resume else [*["manifest.json"] * 3, *sorted(self.files)])
        data = self.files[name]
        if name.endswith(".json") and random.random() < 0.6:
            damaged = mutations.dump(mutations.damage_value(json.loads(data), random), random)
        else:
            damaged = mutations.damage(data, random.choice(list(self.files.values())), random).data
        gone: dict[str, bytes | None] = {"manifest.json": None} if self.resume else {}
        self._write({**gone, name: damaged})
        return self.out / name

    def read(self) -> None:
        if self.resume:
            self._encode()
        else:
            verify(self.out)
            check_command("info", self.out)
            source = open_source(SourceConfig(str(self.out), "understanding"), RowsConfig())
            list(islice(source.stream(0, 1, 0, None), COUNT))
        for key, row in self._rows().items():
            if self.rows.get(key) != row:
                raise WrongPairing(f"{key}: {row} in place of {self.rows.get(key)}")
        if self.resume and self._rows() != self.rows:
            raise Wrong(f"resumed: {len(self._rows())} rows in place of {len(self.rows)}")


class Resumed(Corpora):
    weight = 0.5
    resume = True


class States(Kind):
    """Runs of training that resume from a damaged state or config.json."""

    weight = 0.5

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "photos").mkdir()
        for n in range(4):
            picture(n, 32).save(folder / "photos" / f"{n}.png")
        self.run = folder / "training-run"
        self.training = TrainConfig(model=small_config(), tracker="none")
        for setting in (
            "semantic.steps=3", "semantic.continuous_steps=1", "pixel.steps=3", "pixel.continuous_steps=1",
            "semantic.batch_size=2", "pixel.batch_size=2", "semantic.checkpoint_every=2", "pixel.checkpoint_every=2",
            "keep_checkpoints=3", "pixel.loss.lpips=0", "pixel.loss.critic.weight=0",
        ):  # fmt: skip
            override(self.training, setting)
        self._train()
        self.files = {path.relative_to(self.run): path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        self.names = [name for name in self.files if name.suffix == ".pt" or str(name) == "config.json"]

    def _train(self) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            train(self.training, [self.folder / "photos"], self.run)

    def intact(self) -> Iterator[Callable[[], None]]:
        self._write({})
        yield self.read

    def _write(self, changed: dict[Path, bytes | None]) -> None:
        shutil.rmtree(self.run)
        for name, data in {**self.files, **changed}.items():
            if data is not None:
                path = self.run / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def make(self, random: Random) -> Path:
        name = random.choice(self.names)
        data, other = self.files[name], self.files[random.choice(self.names)]
        if name.suffix == ".json":
            damaged = mutations.dump(mutations.damage_value(json.loads(data), random), random)
        elif random.random() < 0.6:
            state = mutations.damage_state(torch.load(io.BytesIO(data), weights_only=True), random)
            out = io.BytesIO()
            torch.save(state, out)
            damaged = out.getvalue()
        else:
            damaged = mutations.damage(data, other, random).data
        later = {n: None for n in self.names if n.suffix == ".pt" and n.parent == name.parent and n > name}
        self._write({**later, name: damaged})
        return self.run  # a state may be sound and yet not fit those of the stages before, which is said of the run

    def read(self) -> None:
        try:
            self._train()
        except FloatingPointError as error:  # weights that are not finite; the message says how to continue
            raise ValueError(str(error)) from None
