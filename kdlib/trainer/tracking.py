"""Metrics and results to TensorBoard and Weights & Biases, where a study switches them on.

The run's folder holds the same metrics. Results that later steps find (probes, verdicts) come to
the summary of the run at Weights & Biases by `summarise`. A tracker that fails warns once and is
switched off; the training goes on.
"""

import contextlib
import hashlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdlib.repro import files
from kdlib.study.training import Tracking

Values = Mapping[str, float | str | bool]
_LONGEST = 64  # characters of a tag


class Sink(NamedTuple):
    """Where the metrics and the results of one run go."""

    log: Callable[[Values, int], Any]
    summarise: Callable[[Values], Any]
    close: Callable[[], Any]


class Tracker:
    """Writes the metrics and the results of one run to sinks."""

    def __init__(self, openers: Mapping[str, Callable[[], Sink]]) -> None:
        self._sinks: dict[str, Sink] = {}
        for name, opener in openers.items():
            with self._guarded(name):
                self._sinks[name] = opener()

    def log(self, row: Values, step: int) -> None:
        """Write one evaluation's metrics to every sink."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.log(row, step)

    def summarise(self, results: Values) -> None:
        """Write results of the whole run to every sink that has a place for them."""
        for name, sink in list(self._sinks.items()):
            with self._guarded(name):
                sink.summarise(results)

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
        settings: Shown beside the metrics; the run's id is made of them and of the folder, but for
            a student of a sweep, whose agent has given it one.
        resumed_step: Last step that a killed run has logged for good; later ones are logged again.

    Raises: ModuleNotFoundError that says what to install.
    """
    openers: dict[str, Callable[[], Sink]] = {}
    if tracking.tensorboard:
        _require("tensorboard", "torch.utils.tensorboard")
        openers["TensorBoard"] = lambda: _tensorboard(folder, resumed_step)
    if tracking.wandb:
        _require("wandb", "wandb")
        openers["Weights & Biases"] = lambda: _wandb(tracking, folder, name, settings)
    with contextlib.closing(Tracker(openers)) as tracker:
        yield tracker


def summarise(tracking: Tracking, folder: Path, results: Values) -> None:
    """Write results to the summary of a finished run at Weights & Biases, where the study is
    tracked there.

    Raises: ModuleNotFoundError that says what to install.
    """
    if tracking.wandb and results:
        _require("wandb", "wandb")
        settings = files.read_json(folder / "settings.json")
        openers = {"Weights & Biases": lambda: _wandb(tracking, folder, None, settings)}
        with contextlib.closing(Tracker(openers)) as tracker:
            tracker.summarise(results)


def _tensorboard(folder: Path, resumed_step: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def log(row: Values, step: int) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Sink(log, lambda results: None, writer.close)


def _wandb(tracking: Tracking, folder: Path, name: str | None, settings: Mapping[str, Any]) -> Sink:
    import wandb

    study, step, tags = _place(folder)
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=tracking.project, name=name, id=_run_id(folder, step, settings), dir=str(folder),
        group=tracking.group or study, job_type=step, notes=tracking.notes,
        tags=[tag[:_LONGEST] for tag in (tags if tracking.tags is None else tracking.tags)],
        resume="allow", config=dict(settings),
    )  # fmt: skip
    log = lambda row, step: run.log(dict(row), step=step)  # noqa: E731
    return Sink(log, lambda results: run.summary.update(dict(results)), run.finish)


def _run_id(folder: Path, step: str | None, settings: Mapping[str, Any]) -> str:
    """The id of a run at Weights & Biases, kept with the settings for which it was given."""
    of_settings = hashlib.sha256(f"{folder} {files.canonical_json(settings)}".encode()).hexdigest()
    kept, run_id = folder / "wandb" / "id.json", of_settings[:16]
    if kept.is_file() and (before := files.read_json(kept))["of"] == of_settings:
        return before["id"]
    if step == "distill" and "WANDB_SWEEP_ID" in os.environ:  # set by `wandb agent`
        run_id = os.environ.get("WANDB_RUN_ID", run_id)
    files.write_json(kept, {"id": run_id, "of": of_settings})
    return run_id


def _place(folder: Path) -> tuple[str | None, str | None, list[str]]:
    """Study, step and `axis=value` of a run, by its folder."""
    runs = files.workspace() / "runs"
    parts = folder.relative_to(runs).parts if folder.is_relative_to(runs) else ()
    study, step, *axes = (*parts, None, None)[: max(2, len(parts))]
    return study, step, axes


def _require(package: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tracking.{package} needs the package {package}: pip install 'kdlib[tracking]', or "
            "switch it off in the study"
        ) from error
