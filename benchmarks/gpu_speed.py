"""How fast kdlib trains on a GPU, beside the barest loop, and where its steps wait.

    python benchmarks/gpu_speed.py --out FOLDER [--seconds 220] [--dry]

A part of `gpu.py`. Random images of 10 classes. kdlib's step is `training.ours`: the trainer's own,
with a resident loader, flip and crop, channels last. All run under the settings that a study gives
torch on that device (`experiment.use`), but for a bare loop whose name says otherwise. The
contestants of a case take turns in blocks of steps; before and after each block the host waits for
the device. `ms` is the median over the rounds, `ratio` the median over the rounds of the ratio to
the bare loop of the same round. Cases are in order of worth, and no case begins after `--seconds`.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gpu_facts import device_of, synchronise
from gpu_rows import Rows, first_line
from torch.profiler import ProfilerActivity, profile
from training import caches, network_of, ours

from kdlib.cache.shards import Cache
from kdlib.dataset.pixels import Pixels
from kdlib.steps.processes import prepare_device
from kdlib.study.training import Augment, Compute

ROOT = Path(__file__).parents[1]
PADDING = 4
VIEWS = Augment(flip=True, crop_padding=PADDING)
BARE = "bare loop"
OURS = "kdlib"
WARM_UP = 8  # steps before anything is timed
WAITED = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


class Case(NamedTuple):
    """One network, the side of its images in pixels, a batch size, and a precision of kdlib."""

    network: str
    side: int
    batch: int
    precision: str


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        sides: Network -> side of its images, in order of worth.
        batches, precisions: In order of worth.
        n_images: Side -> images of the training set.
        block_s: Seconds of a block.
        rounds: Turns of each contestant.
        counted: Steps over which waits are counted.
        crowd: Numbers of students at once; the last is the number of processes started.
        crowd_s: Seconds for which each number is timed.
        start_s: Seconds in which all processes must have begun.
    """

    sides: dict[str, int]
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    n_images: dict[int, int]
    block_s: float
    rounds: int
    counted: int
    crowd: tuple[int, ...]
    crowd_s: float
    start_s: float


FULL = Size(
    sides={
        "cifar_resnet20": 32, "timm/resnet18": 32, "cifar_resnet8": 32, "timm/mobilenetv2_035": 32,
        "timm/efficientnet_b0": 32, "timm/vit_small_patch16_224": 96,
    },
    batches=(128, 512, 64), precisions=("bf16", "float32"), n_images={32: 51_200, 96: 10_240},
    block_s=0.15, rounds=5, counted=20, crowd=(1, 2, 4, 8, 16), crowd_s=3.0, start_s=90.0,
)  # fmt: skip
DRY = Size(
    sides={"tiny_cnn": 8},
    batches=(8,), precisions=("bf16", "float32"), n_images={8: 64},
    block_s=0.0, rounds=2, counted=2, crowd=(1, 2), crowd_s=0.1, start_s=3600.0,
)  # fmt: skip


@dataclass
class Bench:
    """What all cases share: where rows go, the images of each size, and when to stop."""

    rows: Rows
    folder: Path
    device: str
    size: Size
    stop_at: float  # of time.monotonic()
    _caches: dict[int, tuple[Cache, Cache]] = field(default_factory=dict)
    _n_runs: int = 0

    def caches(self, side: int) -> tuple[Cache, Cache]:
        """Images of a size and stored outputs of a teacher of theirs, made when first asked for."""
        if side not in self._caches:
            place = self.folder / f"side{side}"
            self._caches[side] = caches(place, (3, side, side), self.size.n_images[side])
        return self._caches[side]

    def run_folder(self) -> Path:
        """A folder that no run has had."""
        self._n_runs += 1
        return self.folder / f"run{self._n_runs}"


# --- the contestants ------------------------------------------------------------------------------


def bare(
    images: Cache, case: Case, device: str, *, views: bool = False, graph: bool = False
) -> Callable[[], None]:
    """A step of the barest loop: normalised images, labels and a shuffled order on the device, one
    gather, forward, backward, one fused optimiser step. It reads nothing back.

    Args:
        views: Flip and crop, drawn and gathered on the device.
        graph: Replay the step as one CUDA graph.
    """
    network = network_of(case.network, True, (3, case.side, case.side), device).train()
    pixels = Pixels([0.5] * 3, [0.25] * 3, True).prepare(images.resident("images").to(device))
    flat = pixels.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C), as it lies in memory
    if views:
        flat = F.pad(flat, (0, 0, PADDING, PADDING, PADDING, PADDING))
    labels = images.resident("labels").to(device)
    optimiser = torch.optim.SGD(
        network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    permuted = np.random.default_rng(1).permutation(len(labels))
    order = torch.from_numpy(permuted).to(device).split(case.batch)[: len(labels) // case.batch]

    def inputs(chosen: torch.Tensor) -> torch.Tensor:
        if not views:
            return flat.index_select(0, chosen)
        top, left = torch.randint(2 * PADDING + 1, (2, len(chosen), 1), device=device)
        mirrored = torch.randint(2, (len(chosen), 1), device=device, dtype=torch.bool)
        return cropped(flat, chosen, top, left, mirrored)

    def trained(chosen: torch.Tensor) -> None:
        x = inputs(chosen).permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W), channels last
        with torch.autocast(device, torch.bfloat16, enabled=case.precision == "bf16"):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), labels.index_select(0, chosen))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    if graph:
        trained = _captured(trained, order[0])
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        trained(order[number % len(order)])

    return step


def cropped(
    padded: torch.Tensor,
    chosen: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    mirrored: torch.Tensor,
) -> torch.Tensor:
    """Windows of padded images in one gather: (B, H, W, C).

    Args:
        padded: (N, H + 2 * PADDING, W + 2 * PADDING, C) float32.
        chosen: (B,) int64 in [0, N).
        top, left: (B, 1) int64 in [0, 2 * PADDING].
        mirrored: (B, 1) bool.
    """
    height, width = (length - 2 * PADDING for length in padded.shape[1:3])
    y, x = (torch.arange(length, device=padded.device) for length in (height, width))
    row, column = top + y, left + torch.where(mirrored, width - 1 - x, x)
    return padded[chosen[:, None, None], row[:, :, None], column[:, None, :]]


def _captured(trained: Callable[[torch.Tensor], None], first: torch.Tensor) -> Callable:
    """A step as a CUDA graph that reads its positions from one place."""
    chosen = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trained(chosen)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # a loader's thread may call CUDA meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        trained(chosen)

    def replay(other: torch.Tensor) -> None:
        chosen.copy_(other)
        graph.replay()

    return replay


@contextlib.contextmanager
def torchs_own() -> Iterator[None]:
    """Torch's default settings of a GPU: TF32 in convolutions, and kernels that need not be
    deterministic."""
    tf32, cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn
    held = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(held, warn_only=warns)


def freed(step: Callable[[], None]) -> Callable[[], None]:
    """A step under torch's own settings; to change them takes microseconds."""

    def run() -> None:
        with torchs_own():
            step()

    return run


def ours_of(bench: Bench, case: Case, **options: Any) -> Callable[[], None]:
    """A step of kdlib's loop, with flip and crop unless `augment` says otherwise."""
    images, outputs = bench.caches(case.side)
    if options.pop("stored", False):
        options["teacher"] = outputs
    return ours(
        images,
        case.network,
        bench.run_folder(),
        batch=case.batch,
        device=bench.device,
        precision=case.precision,
        **{"augment": VIEWS} | options,
    )


def makers(bench: Bench, case: Case) -> dict[str, Callable[[], Callable[[], None]]]:
    """Every contestant of a case, by name; the bare loop first."""

    def of_bare(**options: bool) -> Callable[[], Callable[[], None]]:
        return lambda: bare(bench.caches(case.side)[0], case, bench.device, **options)

    def of_ours(**options: Any) -> Callable[[], Callable[[], None]]:
        return lambda: ours_of(bench, case, **options)

    return {
        BARE: of_bare(),
        OURS: of_ours(),
        "kdlib, stored teacher": of_ours(stored=True),
        "kdlib, dynamics recorded": of_ours(recorded=True),
        "kdlib, no augmentation": of_ours(augment=Augment()),
        "bare loop, flip and crop": of_bare(views=True),
        "bare loop, torch's own settings": lambda: freed(of_bare()()),
        **({} if bench.device == "cpu" else {"bare loop, CUDA graph": of_bare(graph=True)}),
    }


def close(step: Callable[[], None]) -> None:
    """End the loader thread of one of kdlib's steps."""
    loop = getattr(step, "__self__", None)
    if loop is not None:
        loop.task.loader.close()


@contextlib.contextmanager
def made(bench: Bench, case: Case, names: Iterable[str]) -> Iterator[dict[str, Callable]]:
    """Warm contestants by name; a row for each that fails, which the others outlive."""
    every, steps = makers(bench, case), {}
    try:
        for name in names:
            try:
                step = every[name]()
                steps[name] = step
                for _ in range(WARM_UP):
                    step()
                synchronise(bench.device)
            except Exception as error:  # whatever goes wrong with one is a finding of its own
                bench.rows.write("error", **case._asdict(), contestant=name, why=first_line(error))
                close(steps.pop(name, None))
        yield steps
    finally:
        for step in steps.values():
            close(step)
        steps.clear()
        gc.collect()
        if bench.device != "cpu":
            torch.cuda.empty_cache()


# --- how fast -------------------------------------------------------------------------------------


def seconds_of(step: Callable[[], None], n: int, device: str) -> float:
    """Seconds a step takes, over `n` of them after one that warms memory."""
    step()
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(n):
        step()
    synchronise(device)
    return (time.perf_counter() - begin) / n


def speeds(bench: Bench, case: Case, names: Iterable[str] = (BARE, OURS)) -> None:
    """A row per contestant: time of a step, images a second, ratio to the bare loop."""
    device, size = bench.device, bench.size
    with made(bench, case, names) as steps:
        n_steps = {
            name: max(2, min(400, round(size.block_s / seconds_of(step, 4, device))))
            for name, step in steps.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(size.rounds):
            for name, step in steps.items():
                taken[name].append(seconds_of(step, n_steps[name], device))
        for name, found in taken.items():
            first, seconds = taken.get(BARE), statistics.median(found)
            ratio = None
            if first is not None:
                ratio = statistics.median(t / f for t, f in zip(found, first, strict=True))
            bench.rows.write(
                "speed", **case._asdict(), device=device, contestant=name, ms=seconds * 1e3,
                images_per_s=case.batch / seconds, ratio=ratio, rounds=size.rounds,
                steps=n_steps[name],
            )  # fmt: skip


def variants(bench: Bench, case: Case) -> None:
    """`speeds` of every contestant."""
    speeds(bench, case, makers(bench, case))


# --- where it waits -------------------------------------------------------------------------------


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals [start, stop)."""
    total, reached = 0.0, -np.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return float(total)


def trace_counts(events: list[dict[str, Any]], n_steps: int) -> dict[str, Any]:
    """What a profiler's trace says of one step.

    Args:
        events: `traceEvents` of Chrome's format, as torch.profiler exports them; `ts` and `dur` in
            microseconds.
        n_steps: Steps the trace covers.

    Returns: Per step: `kernels`, `copies` by direction, `waits` by function of CUDA, `launches`;
        `busy_ms`, in which the device computed or copied; `slowest_ms`, the five kernels that took
        longest.
    """
    whole = [e for e in events if e.get("ph") == "X"]
    kernels = [e for e in whole if e.get("cat") == "kernel"]
    moved = [e for e in whole if e.get("cat") in ("gpu_memcpy", "gpu_memset")]
    called = Counter(e["name"] for e in whole if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    by_kernel: Counter[str] = Counter()
    for event in kernels:
        by_kernel[event["name"][:120]] += event["dur"] / 1e3 / n_steps
    directions = Counter(e["name"].split(" (")[0] for e in moved)
    busy = covered((e["ts"], e["ts"] + e["dur"]) for e in kernels + moved)
    return {
        "kernels": len(kernels) / n_steps,
        "copies": {name: n / n_steps for name, n in directions.items()},
        "waits": {name: called[name] / n_steps for name in WAITED if called[name]},
        "launches": sum(n for name, n in called.items() if "Launch" in name) / n_steps,
        "busy_ms": busy / 1e3 / n_steps,
        "slowest_ms": dict(by_kernel.most_common(5)),
    }


def synchronising_places(caught: Iterable[Any], n_steps: int) -> dict[str, float]:
    """Warnings of synchronising operations per step, by file and line."""
    places: Counter[str] = Counter()
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            path = Path(warning.filename)
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
            places[f"{shown}:{warning.lineno}"] += 1
    return {place: n / n_steps for place, n in places.most_common()}


def counted_syncs(step: Callable[[], None], n: int, device: str) -> dict[str, float] | None:
    """Synchronising operations per step by place, as torch warns of them; None on a CPU."""
    if device == "cpu":
        step()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(n):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return synchronising_places(caught, n)


def traced(step: Callable[[], None], n: int, device: str) -> list[dict[str, Any]]:
    """Events of the profiler during `n` steps."""
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    synchronise(device)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(n):
            step()
        synchronise(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def waits(bench: Bench, case: Case) -> None:
    """A row per contestant: kernels, copies and synchronisations of a step, and the share of its
    time in which the device is busy."""
    names = (OURS, BARE, "kdlib, dynamics recorded", "kdlib, stored teacher")
    device, n = bench.device, bench.size.counted
    with made(bench, case, names) as steps:
        for name, step in steps.items():
            ms = statistics.median(seconds_of(step, n, device) for _ in range(3)) * 1e3
            places = counted_syncs(step, n, device)
            counts = trace_counts(traced(step, n, device), n)
            bench.rows.write(
                "waits", **case._asdict(), device=device, contestant=name, ms=ms,
                syncs=None if places is None else sum(places.values()), sync_places=places,
                busy_share=counts["busy_ms"] / ms if counts["kernels"] else None, **counts,
            )  # fmt: skip


# --- many students at once ------------------------------------------------------------------------


def _student(pipe: Any, case: Case, folder: Path, images: Path, device: str) -> None:
    """One student in a process of its own: trains from one moment to another, as often as asked."""
    try:
        prepare_device(Compute(device=device))
        step = ours(
            Cache(images), case.network, folder, batch=case.batch, device=device,
            precision=case.precision, augment=VIEWS,
        )  # fmt: skip
        for _ in range(WARM_UP):
            step()
        synchronise(device)
        pipe.send("ready")
        while True:
            begin, end = pipe.recv()
            time.sleep(max(0.0, begin - time.monotonic()))
            started, n = time.monotonic(), 0
            while time.monotonic() < end or n == 0:
                step()
                n += 1
            synchronise(device)
            pipe.send((n, time.monotonic() - started))
    except Exception as error:  # the parent makes a row of it
        pipe.send(first_line(error))


def _answers(pipes: list[Any], stop_at: float) -> list[Any]:
    """What each process says; RuntimeError when one says nothing in time, or ends."""
    found = []
    for number, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, stop_at - time.monotonic())):
            raise RuntimeError(f"process {number} of {len(pipes)} gave no answer in time")
        try:
            answer = pipe.recv()
        except EOFError:
            raise RuntimeError(f"process {number} of {len(pipes)} ended") from None
        if isinstance(answer, str) and answer != "ready":
            raise RuntimeError(f"process {number} of {len(pipes)}: {answer}")
        found.append(answer)
    return found


def crowd(bench: Bench, case: Case) -> None:
    """A row per number of students trained at once, each by a process of its own: images a second
    of all together, and as a multiple of one alone."""
    images, _ = bench.caches(case.side)
    context = multiprocessing.get_context("spawn")
    n_started, pipes, processes = bench.size.crowd[-1], [], []
    try:
        for _ in range(n_started):
            pipe, theirs = context.Pipe()
            arguments = (theirs, case, bench.run_folder(), images.folder, bench.device)
            process = context.Process(target=_student, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(pipe)
            processes.append(process)
        _answers(pipes, min(bench.stop_at, time.monotonic() + bench.size.start_s))
        alone = None
        for number in bench.size.crowd:
            begin = time.monotonic() + 0.1
            for pipe in pipes[:number]:
                pipe.send((begin, begin + bench.size.crowd_s))
            found = _answers(pipes[:number], begin + bench.size.crowd_s + bench.size.start_s)
            rates = [case.batch * n / seconds for n, seconds in found]
            alone = alone or sum(rates)
            bench.rows.write(
                "crowd", **case._asdict(), device=bench.device, students=number,
                images_per_s=sum(rates), gain=sum(rates) / alone, slowest_images_per_s=min(rates),
            )  # fmt: skip
    except (RuntimeError, OSError) as error:
        bench.rows.write("error", **case._asdict(), contestant="crowd", why=first_line(error))
    finally:
        for process in processes:  # they have nothing to keep
            process.kill()
            process.join()


# --- all of it, in order of worth -----------------------------------------------------------------


def schedule(size: Size) -> list[tuple[Callable[[Bench, Case], None], Case]]:
    """What is measured, the most useful first; each case once."""
    networks, sides = list(size.sides), size.sides
    batch, precision = size.batches[0], size.precisions[0]

    def case(network: str, batch: int = batch, precision: str = precision) -> Case:
        return Case(network, sides[network], batch, precision)

    first = case(networks[0])
    found = [(variants, first), (waits, first)]
    found += [(speeds, case(network)) for network in networks[1:]]
    found += [(crowd, first)]
    found += [
        (speeds, case(network, precision=p)) for p in size.precisions[1:] for network in networks
    ]
    found += [(waits, case(network)) for network in networks[1:3]]
    found += [(variants, case(network)) for network in networks[1:3]]
    for other in size.batches[1:]:
        found += [(speeds, case(n, other, p)) for p in size.precisions for n in networks]
    return [*found, *((crowd, case(network)) for network in networks[1:2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=220.0)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    stop_at = time.monotonic() + arguments.seconds
    rows, size = Rows(arguments.out, "fast"), DRY if arguments.dry else FULL
    device = prepare_device(Compute(device=device_of(arguments.dry)))
    rows.write(
        "settings",
        threads=torch.get_num_threads(),
        convolutions_tf32=torch.backends.cudnn.allow_tf32,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(rows, Path(folder), device, size, stop_at)
        planned = schedule(size)
        for number, (measure, case) in enumerate(planned):
            if time.monotonic() > stop_at:
                rows.write("left out", cases=len(planned) - number)
                break
            try:
                measure(bench, case)
            except Exception as error:  # the next case may work
                rows.write(
                    "error", **case._asdict(), contestant=measure.__name__, why=first_line(error)
                )


if __name__ == "__main__":
    main()
