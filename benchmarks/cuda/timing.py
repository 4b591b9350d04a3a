"""Times on a GPU: CUDA events around each call, contestants interleaved in random order, medians.

Before every timed call the L2 is flushed by writing a buffer of twice its size, and the device is kept waiting while
the host queues the call; both happen outside the events. So every contestant finds its inputs in HBM, and the time is
that of the device, without the host's overhead, unless the call itself makes the host wait.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Timer = Callable[[Call], float]

HEAD_START = 300_000  # clocks the device waits: some 150 us for the host to queue a call
LEAST_ROUNDS, MOST_ROUNDS = 3, 30
OVERHEAD_US = 300.0  # around a timed call: flush and head start
WARM_UP = 2  # calls before the rounds: the first compiles, tunes and allocates, the second tells how long a call takes
GRAPH_CALLS = 20  # in one graph
MIB = 2**20


def elapsed_us(call: Call) -> float:
    """Between CUDA events around the call."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop)


class EventTimer:
    """Microseconds of one call on the device."""

    def __init__(self) -> None:
        self.flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call) -> float:
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START)
        return elapsed_us(call)


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def rounds_within(budget_us: float, times_us: Sequence[float]) -> int:
    one = sum(times_us) + OVERHEAD_US * len(times_us)
    return min(max(int(budget_us / one), LEAST_ROUNDS), MOST_ROUNDS) if times_us else 0


def race(calls: dict[str, Call], budget_us: float, timer: Timer) -> tuple[dict[str, float], dict[str, str]]:
    """(name -> median us, name -> why it failed): as many rounds as the budget allows, each contestant once a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}

    def turn(name: str) -> None:
        try:
            times[name].append(timer(calls[name]))
        except Exception as error:  # it must not stop the other contestants
            failed[name] = reason(error)
            del times[name]

    for name in [name for name in calls for _ in range(WARM_UP)]:
        if name in times:
            turn(name)
    order = random.Random(0)  # or one contestant would always follow the same other
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds_within(budget_us, [taken[-1] for taken in times.values()])):
            for name in order.sample(list(times), len(times)):
                turn(name)
    finally:
        gc.enable()
    return {name: statistics.median(taken[WARM_UP:]) for name, taken in times.items()}, failed


def graph_us(call: Call) -> float:
    """Device time of a call inside a CUDA graph of several, without the flush: the inputs stay in L2."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    times = [elapsed_us(graph.replay) / GRAPH_CALLS for _ in range(1 + 10)]  # the first warms up
    return statistics.median(times[1:])


def extra_mib(call: Callable[[], Sequence[Tensor]]) -> float:
    """Peak MiB beyond what was allocated before and what is returned."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - sum(o.nbytes for o in outputs)) / MIB


def in_chunks(search: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """search(z) -> ids, on smaller and smaller pieces of z until the N x K of a piece fits in the device's memory."""
    pieces = 1
    while True:
        try:
            size = math.ceil(len(z) / pieces)
            return search(z) if pieces == 1 else torch.cat([search(piece) for piece in z.split(size)])
        except torch.OutOfMemoryError:
            if pieces >= len(z):
                raise
        torch.cuda.empty_cache()  # only here: the exception kept what its frames had allocated
        pieces *= 2
