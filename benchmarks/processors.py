"""Does a portable study give the same bytes on other processors, emulated ones? What does it cost?

    python benchmarks/processors.py            # some 10 minutes; Debian: apt install qemu-user
    python benchmarks/processors.py --steps    # the cost alone: half a minute, no emulator
    python benchmarks/processors.py --tables A.parquet B.parquet    # of one study, made twice

The first steps of the tiny study (teacher, dynamics, outputs, datamap, a student, its probes) are
made on this machine as it is, then with `compute: {portable: true}` on this machine and on emulated
processors of two makers. A row says which of them gave the bytes that this machine gave when held.
A step is forward, backward and SGD of 64 images on one thread; held and free processes take turns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from kdlib.compare.differences import AGAINST, objective_differences, paired_differences
from kdlib.repro import files, processor
from kdlib.study.evaluation import AXES
from kdlib.study.load import load_study
from kdlib.study.models import Model

PROCESSORS = ("Haswell", "EPYC-Rome")  # Intel's first with AVX2, and one of AMD's
STUDY = {
    "base": "tiny.yaml",
    "teacher": {"training": {"epochs": 3}, "expected_accuracy": 0.3},
    "recordings": None,
    "students": {"resnet8": {"model": {"name": "cifar_resnet8"}}},
    "axes": {"student": ["tiny", "resnet8"]},
    "training": {"steps": 30, "checkpoint_fractions": [0, 1]},
}


def make(home: Path) -> dict[str, str]:
    """Fingerprints of what the first steps of the study leave in a workspace."""
    from kdlib.cartography.log import QUANTITIES, DynamicsLog
    from kdlib.steps.cache import cache_images
    from kdlib.steps.datamap import make_datamap
    from kdlib.steps.distill import train_student
    from kdlib.steps.probe import probe_cell
    from kdlib.steps.teacher import make_teacher

    study = load_study(home / "params" / "short.yaml")
    images = cache_images(study)
    teacher = make_teacher(study, images)
    log = DynamicsLog.open(study.recorded_run / "dynamics")
    table = make_datamap(study, images)
    columns = [
        np.asarray(table[name], "U" if name.startswith("region") else None)
        for name in table
        if name != "grand"  # BatchNorm takes roots where `torch.func` maps it over examples
    ]
    cell = study.cell(student="tiny", strategy="easy", objective="kd")
    larger = study.cell(student="resnet8", strategy="easy", objective="kd")
    cells = [(cell, 0), (cell, 1), (larger, 0)]
    students = [train_student(study, images, *one) for one in cells]
    probes = probe_cell(study, images, cell).select_dtypes("number")
    return {
        "teacher": teacher["checkpoints"]["last"]["weights_sha256"],
        "outputs": files.fingerprint(teacher["teacher"]["outputs"]),
        "dynamics": files.sha256_array(*[log[name] for name in QUANTITIES]),
        "datamap": files.sha256_array(*columns),
        "grand": files.sha256_array(table["grand"].to_numpy()),
        "subsets": files.fingerprint([s["subset"]["sha256"] for s in students]),
        "students": files.fingerprint([s["checkpoints"]["last"] for s in students]),
        "probes": files.sha256_array(*[probes[name].to_numpy() for name in probes]),
    }


NETWORKS = {  # name: (model, its options, shape of an image, steps in a round)
    "tiny_cnn, 8 x 8": ("tiny_cnn", {"width": 8}, (1, 8, 8), 200),
    "cifar_resnet8, 32 x 32": ("cifar_resnet8", {}, (3, 32, 32), 20),
    "cifar_resnet56, 32 x 32": ("cifar_resnet56", {}, (3, 32, 32), 4),
}


def time_steps() -> dict[str, float]:
    """Milliseconds a training step takes in this process, held or not."""
    import torch

    from kdlib.models.networks import build_network

    torch.set_num_threads(1)
    told = {}
    for name, (model, options, shape, n_steps) in NETWORKS.items():
        asked = Model(name=model, options=options)
        network = build_network(asked, n_classes=10, image_shape=shape, seed=0)
        network = network.to(memory_format=torch.channels_last)
        images = torch.zeros(64, *shape).to(memory_format=torch.channels_last)
        labels = torch.arange(64) % 10
        optimiser = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
        for step in range(n_steps + 3):
            if step == 3:
                started = time.perf_counter()
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimiser.step()
        told[name] = 1000 * (time.perf_counter() - started) / n_steps
    return told


def print_cost(n_rounds: int = 3) -> None:
    """A row for each network: a step of a free and of a held process, medians of turns."""
    held = processor.KERNELS | processor.LIBRARIES
    rounds = {"free": [], "held": []}
    for _ in range(n_rounds):
        for name, environment in (("free", {}), ("held", held)):
            done = subprocess.run(
                [sys.executable, __file__, "--time"], env=os.environ | environment,
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            rounds[name].append(json.loads(done.stdout))
    print("| a step of 64 images | free (ms) | held (ms) | held / free |")
    print("| --- | ---: | ---: | ---: |")
    for name in NETWORKS:
        free, slow = (statistics.median(one[name] for one in rounds[k]) for k in ("free", "held"))
        print(f"| {name} | {free:.2f} | {slow:.2f} | {slow / free:.2f} |")


def print_agreement(one: str, other: str) -> None:
    """How far two tables of results of the default study agree: accuracies, verdicts."""
    tables = [pd.read_parquet(path) for path in (one, other)]
    cell = [*AXES, "seed"]
    pairs = tables[0].merge(tables[1], on=cell)
    points = 100 * (pairs["test_accuracy_x"] - pairs["test_accuracy_y"])
    against = [*AXES, *AGAINST]
    same, n = 0, 0
    for compared, reference in (
        (paired_differences, "random"), (objective_differences, "plain"),
    ):  # fmt: skip
        verdicts = [compared(table, reference, 0.01, 0.95, "test_accuracy") for table in tables]
        both = verdicts[0].merge(verdicts[1], on=against)
        same, n = same + int((both["verdict_x"] == both["verdict_y"]).sum()), n + len(both)
    print(f"{len(pairs)} runs: differences of {points.std():.2f} points (s.d.), at most ", end="")
    print(f"{points.abs().max():.1f}; {same} of {n} verdicts the same")


def made(folder: Path, portable: bool, emulated: str | None) -> dict[str, str]:
    """The same by a process of its own, on a processor."""
    home = folder / f"{emulated}-{portable}"
    (home / "params").mkdir(parents=True)
    shutil.copy(files.workspace() / "params" / "tiny.yaml", home / "params")
    content = STUDY | {"compute": {"portable": portable}}
    (home / "params" / "short.yaml").write_text(yaml.safe_dump(content))
    # an emulator is given the interpreter itself, which finds no virtual environment by its name
    command = ["qemu-x86_64", "-cpu", emulated] if emulated else []
    command += [os.path.realpath(sys.executable), __file__, "--home", str(home)]
    environment = os.environ | {"KDLIB_HOME": str(home), "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if portable:
        environment |= processor.KERNELS | processor.LIBRARIES
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{emulated}: {done.stderr}")
    return json.loads(done.stdout)


def main() -> int:
    """Print a row for each processor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help="print what it costs, and no more")
    parser.add_argument("--tables", nargs=2, help="two tables of results, to be compared")
    arguments = parser.parse_args()
    if arguments.home is not None or arguments.time:
        print(json.dumps(time_steps() if arguments.time else make(arguments.home)))
        return 0
    if arguments.tables:
        print_agreement(*arguments.tables)
        return 0
    if arguments.steps:
        print_cost()
        return 0
    if shutil.which("qemu-x86_64") is None:
        print("qemu-x86_64 is not here; apt install qemu-user", file=sys.stderr)
        return 1
    rows = [(False, None), (True, None), *((True, name) for name in PROCESSORS)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda row: made(Path(folder), *row), rows))
    held = told[1]
    print(f"| processor | portable | {' | '.join(held)} |")
    print("| --- | --- |" + " --- |" * len(held))
    for (portable, emulated), one in zip(rows, told, strict=True):
        same = " | ".join("same" if one[key] == held[key] else "other" for key in held)
        name = f"{emulated}, emulated" if emulated else processor.name().split(",")[0]
        print(f"| {name} | {'yes' if portable else 'no'} | {same} |")
    others = {key for one in told[1:] for key in held if one[key] != held[key]}
    return int(bool(others - {"grand"}))


if __name__ == "__main__":
    sys.exit(main())
