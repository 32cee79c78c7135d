"""The processes of a step: device and threads of each, and runs that several of them share."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdlib.repro import files, processor
from kdlib.repro.run import Run, open_run
from kdlib.study.study import Study
from kdlib.study.training import Compute
from kdlib.trainer.distributed import World, launch, this_process, wait


def prepare_device(compute: Compute) -> str:
    """Set the number of threads, hold a GPU to float32 and deterministic kernels, and return this
    process's device.

    Raises: RuntimeError when the study's device is not there, or when the study asks for the same
        bytes on every processor and torch has begun to compute with other kernels.
    """
    torch.set_num_threads(compute.threads)
    if compute.portable:
        processor.hold()
    if compute.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"the study asks for {compute.device}, but torch sees no GPU here; set "
                "compute.device: cpu in the study, or run it where a GPU is"
            )
        processor.hold_gpu()
    return this_process(compute.device).device


@contextlib.contextmanager
def open_shared_run(
    study: Study, folder: Path, settings: dict[str, Any], world: World
) -> Iterator[Run]:
    """The run, opened and locked by the first of the processes that share it."""
    if world.first:
        with open_run(study.runs, folder, settings) as run:
            wait(world)
            yield run
    else:
        wait(world)
        yield Run(folder, settings)


def launch_run(
    study: Study, folder: Path, settings: dict[str, Any], step: str, **point: Any
) -> None:
    """Make an unfinished run by several processes under torchrun, when the study asks for several
    and this process is not one of them.

    Raises: RuntimeError when one of them fails (it has printed its error), or when there are fewer
        GPUs than processes.
    """
    alone = this_process(study.compute.device).alone
    if study.compute.processes == 1 or not alone or Run(folder, settings).finished:
        return
    if study.compute.device.startswith("cuda"):
        n_processes, n_gpus = study.compute.processes, torch.cuda.device_count()
        if n_processes > n_gpus:
            raise RuntimeError(
                f"the study asks for {n_processes} processes, one per GPU, and torch sees {n_gpus} "
                "here; lower compute.processes, or run it where as many GPUs are"
            )
    arguments = [str(x) for pair in point.items() for x in (f"--{pair[0]}", pair[1])]
    launch(["kdlib", "step", step, str(write_study(study)), *arguments], study.compute.processes)


def write_study(study: Study) -> Path:
    """A file of the study as it is in memory, for other processes to load."""
    folder, contents = study.runs / "launched", {}
    for part in dict.fromkeys((study.name, study.upstream.name)):
        of = study if part == study.name else study.upstream
        contents[part] = of.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    if study.upstream is not study:  # wherever the file that it shares with lies
        contents[study.name]["shares"] = f"{study.upstream.name}.yaml"
    for name, content in contents.items():  # JSON, which is YAML
        files.write_json(folder / f"{name}.yaml", content)
    return folder / f"{study.name}.yaml"
