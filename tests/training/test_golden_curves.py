"""The losses of short runs of the preset semhitok-tiny, step by step, as text files in golden/.

They fail when a change of the code changes what training computes. If that is intended, rewrite them:

    SEMHITOK_REWRITE_GOLDEN=1 python -m pytest tests/training/test_golden_curves.py

and look at the difference before committing it.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from semhitok.config import override, train_config
from semhitok.data.images import save_png
from semhitok.training import log, train

GOLDEN = Path(__file__).parent / "golden"
# The preset with smaller images, fewer codes and fewer steps: some without quantisation, k-means, then quantised ones.
SETTINGS = [
    "model.image_size=32", "model.teacher.image_size=32", "model.num_codes=32", "semantic.steps=16",
    "semantic.continuous_steps=6", "semantic.init_tokens_per_code=16", "semantic.batch_size=4", "pixel.steps=10",
    "pixel.continuous_steps=3", "pixel.init_tokens_per_code=4", "pixel.batch_size=4",
    "tracker=none",
]  # fmt: skip
CRITIC = [
    "pixel.loss.critic.weight=0.1", "pixel.loss.critic.train_from=1", "pixel.loss.critic.start=3",
    "pixel.loss.critic.ramp=3", "pixel.loss.critic.adaptive=true", "pixel.loss.critic.lecam=0.01",
    "pixel.loss.critic.augment=true", "pixel.loss.critic.width=8", "pixel.loss.critic.layers=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of coloured blocks: integers only, so that they are the same everywhere."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for n in range(6):
        blocks = torch.randint(256, (3, 8, 9), generator=generator)
        image = blocks.repeat_interleave(11, dim=1).repeat_interleave(11, dim=2)
        save_png(image / 255, folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def curves(pictures, tmp_path_factory):
    """The losses of every step, by the name of the file."""
    folder = tmp_path_factory.mktemp("runs")
    start = f"start_from={folder / 'semantic' / 'checkpoint'}"
    runs = {
        "semantic": ["stages=[semantic]"],
        "pixel": ["stages=[pixel]", start],
        "pixel-critic": ["stages=[pixel]", start, *CRITIC],
    }
    curves = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "LOG_EVERY", 1)
        for name, more in runs.items():
            config = train_config("semhitok-tiny")
            for setting in [*SETTINGS, *more]:
                override(config, setting)
            (stage,) = train(config, [pictures], folder / name)
            records = map(json.loads, (folder / name / stage / "log.jsonl").read_text().splitlines())
            curves[name] = [{key: r[key] for key in ("loss", "critic_loss") if key in r} for r in records]
    return curves


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semantic", "pixel", "pixel-critic"])
def test_losses_are_those_on_file(name, curves):
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("SEMHITOK_REWRITE_GOLDEN"):
        lines = [" ".join([f"{n:3}", *(f"{key} {x:.6f}" for key, x in r.items())]) for n, r in enumerate(curves[name])]
        path.write_text("\n".join(lines) + "\n")
    golden = [line.split()[1:] for line in path.read_text().splitlines()]
    assert len(curves[name]) == len(golden)
    for step, (found, line) in enumerate(zip(curves[name], golden, strict=True)):
        expected = {key: float(x) for key, x in zip(line[::2], line[1::2], strict=True)}
        assert found == pytest.approx(expected, rel=1e-3), f"step {step}"
