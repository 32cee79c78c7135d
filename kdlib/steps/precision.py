"""The precision of a study's trainings, measured once and kept in `runs/<study>/precision.json`."""

import time
from typing import Any

import torch

from kdlib.dataset.images import Images
from kdlib.models.base import Network, in_precision
from kdlib.models.networks import network_for
from kdlib.repro import files, processor
from kdlib.repro.seeds import torch_seeded
from kdlib.steps.folders import measured_precision, precision_file, precision_input
from kdlib.steps.processes import prepare_device
from kdlib.study.fingerprints import dumped
from kdlib.study.study import Study
from kdlib.study.training import Training
from kdlib.trainer.optimiser import make_optimiser

STEP_S, MEASURED_S = 0.1, 1.0  # seconds of a float32 step that is timed, and of all steps together
FEWEST, MOST = 8, 20  # images of a step; steps of each precision


def decided(study: Study, images: Images) -> dict[str, str]:
    """What `precision_input` gives, decided before a study's first training: a step is timed in
    float32, and one in the other type that it asks for, or in bfloat16.

    Of a named precision that is slower on this machine than float32, a sentence is printed once.
    """
    asked, device = study.compute.precision, study.compute.device
    if asked == "float32":
        return {}
    name = torch.cuda.get_device_name if device.startswith("cuda") else lambda _: processor.name()
    with files.locked(precision_file(study).with_suffix(".lock")):
        kept, here = measured_precision(study), f"{device} ({name(device)})"
        if not kept or (asked != "auto" and kept["device"] != here):
            kept = {"asked": dumped(study)["compute"], "device": here} | _measure(study, images)
            files.write_json(precision_file(study), kept)
            if asked != "auto" and kept["ratio"] < 1:
                print(
                    f"{study.name} asks for {asked}, and on {here} its step takes "
                    f"{1 / kept['ratio']:.1f} times as long as one in float32: set "
                    "compute.precision to float32, or to auto, which takes the faster"
                )
    return precision_input(study)


def _measure(study: Study, images: Images) -> dict[str, Any]:
    """Time steps of the study's first student on its first training images."""
    name, device, training = study.axes.student[0], prepare_device(study.compute), study.training
    asked = study.compute.precision
    other = "bf16" if asked == "auto" else asked
    network = network_for(images, study.students[name].model, 0, device).train()
    most = training.batch_size // (training.accumulate * study.compute.processes)
    ids = images.train_ids[: max(most, 1)]
    pixels = images.pixels.prepare(torch.from_numpy(images.train.read("images", ids)).to(device))
    few = pixels[:FEWEST]
    for precision in ("float32", other, "float32"):  # the first steps of a type prepare kernels
        seconds = _seconds(network, few, precision, training)
    n = min(len(ids), max(len(few), int(len(few) * STEP_S / seconds)))
    taken_s: dict[str, list[float]] = {"float32": [], other: []}
    began = time.monotonic()
    while not taken_s[other] or time.monotonic() - began < MEASURED_S:
        for precision, steps in taken_s.items():
            steps.append(_seconds(network, pixels[:n], precision, training))
        if len(taken_s[other]) == MOST:
            break
    best = {precision: min(steps) for precision, steps in taken_s.items()}
    ratio = best["float32"] / best[other]
    return {
        "taken": asked if asked != "auto" else other if ratio > 1 else "float32",
        "seconds": best,
        "ratio": ratio,
        "student": name,
        "images": n,
    }


def _seconds(network: Network, pixels: torch.Tensor, precision: str, training: Training) -> float:
    """Seconds of a step: both passes and the update of weights."""
    kind = pixels.device.type
    optimiser = make_optimiser(network.parameters(), training)
    _wait(kind)
    began = time.monotonic()
    with torch_seeded(0, "dropout"):
        with in_precision(kind, precision):
            features = network.features(pixels)
        features.float().square().mean().backward()
    optimiser.step()
    _wait(kind)
    elapsed = time.monotonic() - began
    network.zero_grad()
    return elapsed


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
