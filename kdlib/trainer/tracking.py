"""Metrics to TensorBoard and Weights & Biases, where a study switches them on.

The run's folder holds the same metrics. A tracker that fails warns once and is switched off; the
training goes on.
"""

import contextlib
import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdlib.repro import files
from kdlib.study.training import Tracking

Sink = tuple[Callable[[Mapping[str, float], int], Any], Callable[[], Any]]


class Tracker:
    """Writes the metrics of one run to sinks: pairs of `log(row, step)` and `close()`."""

    def __init__(self, openers: Mapping[str, Callable[[], Sink]]) -> None:
        self._sinks: dict[str, Sink] = {}
        for name, opener in openers.items():
            with self._guarded(name):
                self._sinks[name] = opener()

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Write one evaluation's metrics to every sink."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink[0](row, step)

    def close(self) -> None:
        """Close every sink."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink[1]()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Turn any error of a sink into a warning, and switch the sink off."""
        try:
            yield
        except Exception as error:
            self._sinks.pop(name, None)
            warnings.warn(
                f"{name} failed and is off for the rest of this run ({files.one_line(error)}); the "
                "metrics are in the run's folder",
                stacklevel=4,
            )


@contextlib.contextmanager
def open_tracker(
    tracking: Tracking, folder: Path, name: str, settings: Mapping[str, Any], resumed_step: int
) -> Iterator[Tracker]:
    """A tracker for one run; its packages are imported when they are switched on.

    Args:
        folder: Of the run.
        settings: Shown beside the metrics; the run's id is made of them and of the folder.
        resumed_step: Last step that a killed run has logged for good; later ones are logged again.

    Raises: ModuleNotFoundError that says what to install.
    """
    openers: dict[str, Callable[[], Sink]] = {}
    if tracking.tensorboard:
        _require("tensorboard", "torch.utils.tensorboard")
        openers["TensorBoard"] = lambda: _tensorboard(folder, resumed_step)
    if tracking.wandb:
        _require("wandb", "wandb")
        openers["Weights & Biases"] = lambda: _wandb(tracking.project, folder, name, settings)
    with contextlib.closing(Tracker(openers)) as tracker:
        yield tracker


def _tensorboard(folder: Path, resumed_step: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def log(row: Mapping[str, float], step: int) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, writer.close


def _wandb(project: str, folder: Path, name: str, settings: Mapping[str, Any]) -> Sink:
    import wandb

    run_id = hashlib.sha256(f"{folder} {files.canonical_json(settings)}".encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project, name=name, id=run_id[:16], dir=str(folder), resume="allow",
        config=dict(settings),
    )  # fmt: skip
    return lambda row, step: run.log(dict(row), step=step), run.finish


def _require(package: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tracking.{package} needs the package {package}: pip install 'kdlib[tracking]', or "
            "switch it off in the study"
        ) from error
