"""Does a portable study give the same bytes on other processors? Emulated ones, in QEMU.

    python benchmarks/processors.py            # about 15 minutes; Debian: apt install qemu-user

The first steps of the tiny study (teacher, dynamics, outputs, datamap, a student, its probes) are
made on this machine as it is, then with `compute: {portable: true}` on this machine and on emulated
processors of two makers. A row says which of them gave the bytes that this machine gave when held.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from kdlib import files, params, processor

PROCESSORS = ("Haswell", "EPYC-Rome")  # Intel's first with AVX2, and one of AMD's
STUDY = {
    "base": "tiny.yaml",
    "teacher": {"training": {"epochs": 3}, "expected_accuracy": 0.3},
    "recordings": None,
    "training": {"steps": 30},
}


def make(home: Path) -> dict[str, str]:
    """Fingerprints of what the first steps of the study leave in a workspace."""
    from kdlib import dataset, distilling, dynamics, mapping, probing, teaching

    study = params.load_study(home / "params" / "short.yaml")
    images = dataset.cache_images(study)
    teacher = teaching.make_teacher(study, images)
    log = dynamics.DynamicsLog.open(study.recorded_run / "dynamics")
    table = mapping.make_datamap(study, images)
    cell = study.cell(strategy="easy", objective="kd")
    students = [distilling.train_student(study, images, cell, seed) for seed in study.seeds]
    probes = probing.probe_cell(study, images, cell).select_dtypes("number")
    return {
        "teacher": teacher["checkpoints"]["last"]["weights_sha256"],
        "outputs": files.fingerprint(teacher["teacher"]["outputs"]),
        "dynamics": files.sha256_array(*[log[name] for name in dynamics.QUANTITIES]),
        "datamap": files.sha256_array(*[table[name].to_numpy() for name in table]),
        "subsets": files.fingerprint([s["subset"]["sha256"] for s in students]),
        "students": files.fingerprint([s["checkpoints"]["last"] for s in students]),
        "probes": files.sha256_array(*[probes[name].to_numpy() for name in probes]),
    }


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
    if (home := parser.parse_args().home) is not None:
        print(json.dumps(make(home)))
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
    return int(any(one != held for one in told[1:]))


if __name__ == "__main__":
    sys.exit(main())
