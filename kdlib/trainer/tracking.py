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


class Tracker:
    """Writes the metrics of one run to sinks, which have `log(row, step)` and `close()`."""

    def __init__(self, openers: Mapping[str, Callable[[], Any]]) -> None:
        self._sinks: dict[str, Any] = {}
        for name, opener in openers.items():
            with self._guarded(name):
                self._sinks[name] = opener()

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Write one evaluation's metrics to every sink."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.log(row, step)

    def close(self) -> None:
        """Close every sink."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.close()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Turn any error of a sink into a warning, and switch the sink off."""
        try:
            yield
        except Exception as error:
            self._sinks.pop(name, None)
            warnings.warn(
                f"{name} failed and is off for the rest of this run ({error}); the metrics are in "
                "the run's folder",
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
    openers: dict[str, Callable[[], Any]] = {}
    if tracking.tensorboard:
        _require("tensorboard", "torch.utils.tensorboard")
        openers["TensorBoard"] = lambda: _TensorBoard(folder, resumed_step)
    if tracking.wandb:
        _require("wandb", "wandb")
        openers["Weights & Biases"] = lambda: _Wandb(tracking.project, folder, name, settings)
    tracker = Tracker(openers)
    try:
        yield tracker
    finally:
        tracker.close()


class _TensorBoard:
    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def log(self, row: Mapping[str, float], step: int) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        run_id = hashlib.sha256(f"{folder} {files.canonical_json(settings)}".encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project, name=name, id=run_id[:16], dir=str(folder), resume="allow",
            config=dict(settings),
        )  # fmt: skip

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


def _require(package: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tracking.{package} needs the package {package}: pip install 'kdlib[tracking]', or "
            "switch it off in the study"
        ) from error
