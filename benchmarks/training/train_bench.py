"""Training for real, for some minutes a stage: images/s, MFU, memory, and where the time goes.

    python -m benchmarks.training.train_bench --preset semhitok-256-one-gpu --device cuda --minutes 2

Runs the stages of `semhitok train` on generated JPEG files, at the preset's full size and batch, with its precision,
compilation and data workers; weights are random, the critic takes part from the first step, codes are set by k-means
after one step. LPIPS has random weights, too (which cost what the published ones do), and is left out without lpips.

ms/step       median over the steps after the warm-up, `images` of the global batch in each
TFLOP/image   multiplications and additions of forward and backward pass, teacher, LPIPS and critic included, counted on
              the uncompiled stage; the quantizer's own are not in it
MFU           of the card's bf16 peak by its data sheet; `of matmul`: of what a large matrix product reaches here, in
              bf16 runs the faster of one in bf16 and one in fp32, as few CPUs have instructions for bf16
GiB           peak of allocated memory on a GPU, of resident memory on a CPU
waiting       share of the time in which the loop waited for data

Where the time goes is measured in steps of their own, with the device waited for at every border, which makes them
longer than the others. On a GPU the kernels of two more steps follow.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from semhitok.config import TrainConfig, override, train_config
from semhitok.data.training_images import TrainingImages

SKIPPED = 77  # exit status where a package is missing
WARM_UP = 5  # steps after which nothing is compiled or initialised any more
SECTION_STEPS = 5
PROFILED_STEPS = 2
SETTINGS = [
    "model.teacher.pretrained=false", "tracker=none", "keep_checkpoints=1", "semantic.continuous_steps=1",
    "semantic.init_tokens_per_code=2", "semantic.kmeans_iterations=2", "pixel.continuous_steps=1",
    "pixel.init_tokens_per_code=0.2", "pixel.kmeans_iterations=2", "pixel.loss.critic.train_from=0",
    "pixel.loss.critic.start=0", "pixel.loss.critic.ramp=0",
]  # fmt: skip
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}  # dense bf16 TFLOP/s by the data sheets


class Clock:
    """Time by section, that of inner sections taken out; with the device's work waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on = device, False
        self.spent: Counter[str] = Counter()
        self.stack: list[str] = []
        self.mark = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    def enter(self, name: str) -> None:
        if self.on:
            now = self.now()
            if self.stack:
                self.spent[self.stack[-1]] += now - self.mark
            self.stack.append(name)
            self.mark = now

    def leave(self) -> None:
        if self.on:
            now = self.now()
            self.spent[self.stack.pop()] += now - self.mark
            self.mark = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.enter(name)
            try:
                return function(*arguments, **options)
            finally:
                self.leave()

        return call

    def watch(self, name: str, module: nn.Module | None) -> None:
        if module is not None:
            module.register_forward_pre_hook(lambda *_: self.enter(name))
            module.register_forward_hook(lambda *_: self.leave(), always_call=True)


class TimedBatches(Iterator[Any]):
    """Batches that a clock sees the loop wait for; `waits` are the seconds, one for each."""

    def __init__(self, batches: Any, clock: Clock, waits: list[float]) -> None:
        self.batches, self.waits = batches, waits
        self.next = clock.timed("data", batches.__next__)

    def __next__(self) -> Any:
        begun = perf_counter()
        batch = self.next()
        self.waits.append(perf_counter() - begun)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


class TimedImages(TrainingImages):
    """Training images in `TimedBatches`."""

    clock: Clock
    waits: list[float]

    def batches(self, *arguments: Any) -> Any:
        return TimedBatches(super().batches(*arguments), self.clock, self.waits)


class Observer:
    """Stands between the loop and a stage: times steps, then sections, then profiles, then stops the run."""

    def __init__(self, stage: Any, clock: Clock, images: TimedImages, minutes: float, stop: Any) -> None:
        self.clock, self.images, self.minutes, self.stop = clock, images, minutes, stop
        self.times: list[float] = []  # of steps after the warm-up
        self.waits: list[float] = []
        self.section_times: list[float] = []
        self.steps, self.begun, self.last = 0, 0.0, 0.0
        self.kernels = ""
        self.profiler: Any = None
        self.after_step = stage.after_step
        stage.after_step = self.after
        for part in stage.parts:
            critic = part.name == "critic"
            forward = "critic's own loss" if critic else "losses, rest of forward"
            timed = partial(self.accumulate, part.accumulate, forward)
            part.accumulate = clock.timed("critic's backward" if critic else "backward, clipping", timed)
            part.step = clock.timed("optimizers, EMA", part.step)
        model, reconstruction = stage.model, getattr(stage, "reconstruction", None)
        for teacher in (model.teacher, *model.more_teachers):
            clock.watch("teacher", teacher)
        clock.watch("semantic head", model.semantic_head)
        clock.watch("semantic decoder", model.semantic_decoder)
        clock.watch("pixel encoder", model.encoder)
        clock.watch("quantizer", model.quantizer)
        clock.watch("quantizer", model.quantizer.semantic)
        if reconstruction is not None:
            model.decoder.maps = clock.timed("pixel decoder", model.decoder.maps)
            clock.watch("LPIPS", reconstruction.perceptual)
            clock.watch("SqueezeNet distance", reconstruction.squeezenet)
            clock.watch("critic", reconstruction.critic)

    def accumulate(self, accumulate: Any, forward: str, items: Any, loss: Any) -> Any:
        """A part's `accumulate` with its loss timed as a section."""
        return accumulate(items, self.clock.timed(forward, loss))

    def after(self, outputs: Any, step: int, seed: int) -> dict[str, Any]:
        """The stage's `after_step`, and what comes at the end of a step."""
        figures = self.clock.timed("codebook updates", self.after_step)(outputs, step, seed)
        now = self.clock.now()
        self.steps += 1
        cuda = self.clock.device.type == "cuda"
        if self.steps == WARM_UP:
            self.begun = now
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        elif self.clock.on:
            self.section_times.append(now - self.last)
            if len(self.section_times) == SECTION_STEPS:
                self.clock.on = False
                if cuda:
                    self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                    self.profiler.start()
                else:
                    self.stop.signum = signal.SIGTERM
        elif self.profiler is not None:
            self.profiled(now)
        elif self.steps > WARM_UP:
            self.times.append(now - self.last)
            self.waits.append(self.images.waits[-1])
            self.clock.on = now - self.begun > 60 * self.minutes and len(self.times) > 1
        self.last = now
        return figures

    def profiled(self, now: float) -> None:
        if self.steps - WARM_UP - len(self.times) - SECTION_STEPS == PROFILED_STEPS:
            self.profiler.stop()
            table = self.profiler.key_averages().table("self_device_time_total", row_limit=15, max_name_column_width=90)
            self.kernels = f"kernels of {PROFILED_STEPS} steps\n{table}"
            self.stop.signum = signal.SIGTERM


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEG files a little larger than a crop: smooth colours and some noise, which decode like photographs."""
    from PIL import Image

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    height, width = side * 3 // 2, side * 13 // 8
    for n in range(count):
        colours = torch.rand(1, 3, 8, 8, generator=generator)
        picture = nn.functional.interpolate(colours, (height, width), mode="bicubic")[0]
        picture += 0.05 * torch.randn(3, height, width, generator=generator)
        pixels = picture.clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{n:04}.jpg", quality=90)


def flops_per_image(stage: Any, size: int, device: torch.device) -> float:
    """Of the loss and its gradient, of all parts."""
    from semhitok.data.batch import Batch

    count = 2
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    batch = Batch(images, 0, count, ("flops",))
    for part in stage.parts:
        part.setup(shard=False)
    with FlopCounterMode(display=False) as counter:
        stage.backward([batch], stage.config.steps - 1)
    for part in stage.parts:
        part.module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / count


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, with the second factor transposed, as a linear layer has its weights."""
    side, rounds = (8192, 20) if device.type == "cuda" else (1536, 5)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    clock = Clock(device)
    for _ in range(rounds):
        begun = clock.now()
        a @ b.T
        times.append(clock.now() - begun)
    return 2 * side**3 / median(times)


def random_lpips() -> nn.Module:
    import lpips

    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)


def peak_memory(device: torch.device) -> float:
    """GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, model: Any, config: TrainConfig, folder: Path, device: torch.device, minutes: float) -> Observer:
    """Train one stage, observed."""
    from semhitok.training.loop import Interrupted, Run, StopOnSignal, run_stage
    from semhitok.training.run import STAGES

    clock = Clock(device)
    images = TimedImages([folder / "images"], config.model.image_size, config.data, config.seed)
    images.clock, images.waits = clock, []
    with StopOnSignal() as stop:
        stage = STAGES[name](model, config)
        observer = Observer(stage, clock, images, minutes, stop)
        run = Run(config, folder / "run", images, stop, config.evaluation.every, lambda: images.other(0x5EED))
        with contextlib.suppress(Interrupted):
            run_stage(stage, run)
    return observer


def rows(observer: Observer, config: Any, flops: float, ceilings: Iterable[float], device: Any) -> Iterator[str]:
    step = median(observer.times)
    rate = config.batch_size * flops / step
    shares = "".join(f"{rate / ceiling:10.1%}" if ceiling else f"{'-':>10}" for ceiling in ceilings)
    waiting = sum(observer.waits) / sum(observer.times)
    micro = config.micro_batch or config.batch_size
    yield (
        f"{config.batch_size:7} {micro:6} {len(observer.times):6} {step * 1e3:9.1f} {config.batch_size / step:9.2f} "
        f"{flops / 1e12:12.4f}{shares} {peak_memory(device):7.2f} {waiting:8.1%}"
    )
    total = sum(observer.section_times)
    spent = observer.clock.spent
    spent["the rest of the loop"] = total - sum(spent.values())
    for name, seconds in spent.most_common():
        yield f"    {name:26} {seconds / len(observer.section_times) * 1e3:9.1f} ms {seconds / total:7.1%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="semhitok-256-one-gpu", help="or a YAML file (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=2, help="of each stage, after the warm-up (default: 2)")
    parser.add_argument("--images", type=int, default=512, help="files to train on (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as `semhitok train`")
    args = parser.parse_args()
    if importlib.util.find_spec("timm") is None:
        print("train_bench.py: timm is not installed: pip install semhitok[train]", file=sys.stderr)
        return SKIPPED
    from semhitok.tokenizer import SemHiTok
    from semhitok.training.run import STAGES

    device = torch.device(args.device)
    config = train_config(args.preset)
    perceptual = random_lpips if importlib.util.find_spec("lpips") is not None else None
    for setting in [*SETTINGS, *([] if perceptual else ["pixel.loss.lpips=0"]), *args.set]:
        override(config, setting)
    on_cuda = device.type == "cuda"
    card = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    peak = next((1e12 * p for name, p in PEAKS.items() if on_cuda and name in card), 0.0)
    bf16 = config.precision == "bf16"
    matmul, fastest = max((matmul_rate(device, getattr(torch, t)), t) for t in ("float32", "bfloat16")[: 1 + bf16])
    print(f"{args.preset}; torch {torch.__version__}, CUDA {torch.version.cuda if on_cuda else '-'}, {card}")
    print(f"peak {peak / 1e12:.0f} TFLOP/s by the data sheet; " if peak else "", end="")
    print(f"a large {fastest} matrix product here: {matmul / 1e12:.2f} TFLOP/s")
    lpips_loss = "with random weights" if perceptual and config.pixel.loss.lpips else "left out"
    if config.data.workers == "auto":
        from semhitok.training.workers import of_machine

        config.data.workers = of_machine(device.type)
    reading = f"{config.data.workers} data workers"
    print(f"compile {config.compile}, precision {config.precision}, {reading}; LPIPS {lpips_loss}")
    titles = f"{'images':>7} {'micro':>6} {'steps':>6} {'ms/step':>9} {'images/s':>9} {'TFLOP/image':>12}"
    print(f"\n{'':9}{titles}{'MFU':>10}{'of matmul':>10} {'GiB':>7} {'waiting':>8}", flush=True)
    kernels = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if perceptual:
            stack.enter_context(mock.patch("semhitok.training.reconstruction.perceptual_loss", perceptual))
        write_images(folder / "images", args.images, config.model.image_size)
        torch.manual_seed(0)
        model = SemHiTok(config.model, load_teacher=False).to(device).train()
        for name in config.stages:
            flops = flops_per_image(STAGES[name](model, config), config.model.image_size, device)
            observer = measure(name, model, config, folder, device, args.minutes)
            lines = rows(observer, config.stage_configs[name], flops, (peak, matmul), device)
            print(f"{name:9}{next(lines)}")
            print("\n".join(lines), flush=True)
            kernels.append(observer.kernels and f"\n{name}: {observer.kernels}")
    print("".join(kernels), end="")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
