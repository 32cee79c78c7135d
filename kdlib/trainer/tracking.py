"""Metrics to TensorBoard and Weights & Biases, where a study switches them on.

The run's folder is the record; these are views of it. A tracker that fails says so once and stops
nothing. Leaves to others: what is measured (`trainer`).
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdlib.repro import files
from kdlib.study.training import Tracking


class Tracker:
    """Where one run's metrics go."""

    def __init__(self) -> None:
        self._sinks: dict[str, Callable[[Mapping[str, float], int], None]] = {}

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Hand one evaluation's metrics on; a sink that fails is dropped with a warning."""
        for name, sink in list(self._sinks.items()):
            with self._stopping_nothing(name):
                sink(row, step)

    @contextlib.contextmanager
    def _stopping_nothing(self, name: str) -> Iterator[None]:
        """Whatever a tracker raises, training goes on without it."""
        try:
            yield
        except Exception as error:
            self._sinks.pop(name, None)
            warnings.warn(
                f"{name} failed and is off for the rest of this run ({error}); the metrics are in "
                "the run's folder",
                stacklevel=3,
            )


@contextlib.contextmanager
def open_tracker(
    tracking: Tracking, folder: Path, name: str, settings: Mapping[str, Any], resumed_step: int
) -> Iterator[Tracker]:
    """A tracker for one run; its packages are imported when they are switched on.

    Args:
        folder: The run's.
        settings: Shown beside the metrics; with the folder they name the run for ever.
        resumed_step: Steps already logged by a killed run; later ones are logged anew.

    Raises: ModuleNotFoundError that says what to install.
    """
    tracker = Tracker()
    with contextlib.ExitStack() as stack:
        if tracking.tensorboard:
            stack.enter_context(_tensorboard(tracker, folder, resumed_step))
        if tracking.wandb:
            stack.enter_context(_wandb(tracker, tracking.project, folder, name, settings))
        yield tracker


@contextlib.contextmanager
def _tensorboard(tracker: Tracker, folder: Path, resumed_step: int) -> Iterator[None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    name = "TensorBoard"
    with tracker._stopping_nothing(name):
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

        def sink(row: Mapping[str, float], step: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        tracker._sinks[name] = sink
    try:
        yield
    finally:
        if name in tracker._sinks:
            with tracker._stopping_nothing(name):
                writer.close()


@contextlib.contextmanager
def _wandb(
    tracker: Tracker, project: str, folder: Path, name: str, settings: Mapping[str, Any]
) -> Iterator[None]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    named = hashlib.sha256(f"{folder} {files.canonical_json(settings)}".encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    sink = "Weights & Biases"
    with tracker._stopping_nothing(sink):
        run = wandb.init(
            project=project, name=name, id=named[:16], dir=str(folder), resume="allow",
            config=dict(settings),
        )  # fmt: skip
        tracker._sinks[sink] = lambda row, step: run.log(dict(row), step=step)
    try:
        yield
    finally:
        if sink in tracker._sinks:
            with tracker._stopping_nothing(sink):
                run.finish()


def _missing(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"tracking.{package} needs the package {package}: pip install 'kdlib[tracking]', or switch "
        "it off in the study"
    )
