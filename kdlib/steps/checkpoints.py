"""The checkpoints of a run: which are kept, their accuracy, and their weights read back."""

from pathlib import Path
from typing import Any

from kdlib.dataset.images import Images
from kdlib.dataset.plan import Plan
from kdlib.models.base import Network
from kdlib.models.evaluation import evaluate
from kdlib.models.weights import load_weights
from kdlib.repro import files
from kdlib.repro.commands import delete_and_run
from kdlib.study.training import Training
from kdlib.trainer.loop import Trained


def measure_checkpoints(
    folder: Path, network: Network, images: Images, trained: Trained
) -> dict[str, dict[str, Any]]:
    """Step, file, fingerprints, test accuracy, macro scores and test loss of the `last` and the
    `best` checkpoint; without labels the validation loss of the objective instead. The network then
    has the weights of one of them."""
    measured: dict[int, dict[str, Any]] = {}
    if images.test is not None:
        device = next(network.parameters()).device
        test = [images.test.resident(column).to(device) for column in ("images", "labels")]
    for step in dict.fromkeys((trained.last_step, trained.best_step)):
        file, weights_sha256 = trained.checkpoints[step]
        _load(network, folder / file, weights_sha256)
        measured[step] = {
            "step": step,
            "file": file,
            "file_sha256": files.sha256_file(folder / file),
            "weights_sha256": weights_sha256,
        }
        if images.test is None:
            row = trained.metrics.set_index("step").loc[step]
            measured[step]["validation_loss"] = float(row["validation_loss"])
            continue
        again = evaluate(network, images.pixels, *test, macro=True)
        measured[step] |= {
            "test_accuracy": again.accuracy,
            "test_loss": again.loss,
            **{f"test_{name}": score for name, score in again.macro.items()},
            "read": again.read,
        }
    return {"last": measured[trained.last_step], "best": measured[trained.best_step]}


def shown_results(evidence: dict[str, Any], checkpoints: dict[str, Any]) -> dict[str, float]:
    """What a tracker shows of a whole training."""
    last, best = checkpoints["last"], checkpoints["best"]
    measured = "test_accuracy" if "test_accuracy" in last else "validation_loss"
    results = {name: last[name] for name in last if name.startswith("test_") or name == measured}
    selection = evidence["selection"]  # no best epoch where the teacher learnt from these images
    if selection["held_out"]["n"] and not selection["teacher_overlap"]:
        results |= {f"{measured}_best": best[measured], "best_step": best["step"]}
    return results | evidence["budget"]["recorded"]


def keep_epoch(training: Training, plan: Plan, epoch: int | None) -> Training:
    """A training with one more checkpoint, at the end of an epoch counted from 1.

    Raises: ValueError for an epoch beyond its end.
    """
    if epoch is None:
        return training
    steps_of_epoch = len(plan.example_ids) / plan.batch_size
    step = _end_of_epoch(epoch, steps_of_epoch)
    if step > plan.n_steps:
        raise ValueError(
            f"dynamics.gradient_epoch is {epoch}; the recorded training ends after "
            f"{plan.n_steps / steps_of_epoch:g} epochs"
        )
    kept = (*training.checkpoint_fractions, step / plan.n_steps)
    return training.model_copy(update={"checkpoint_fractions": kept})


def _end_of_epoch(epoch: int, steps_of_epoch: float) -> int:
    return round(epoch * steps_of_epoch)


def load_epoch(network: Network, folder: Path, evidence: dict[str, Any], epoch: int) -> None:
    """Load the weights that `keep_epoch` kept; as `load_step`."""
    load_step(network, folder, evidence, _end_of_epoch(epoch, evidence["epochs_in_steps"]))


def load_last(network: Network, folder: Path, evidence: dict[str, Any]) -> None:
    """Load the weights of the last step of a run; as `load_step`."""
    load_step(network, folder, evidence, evidence["checkpoints"]["last"]["step"])


def load_step(network: Network, folder: Path, evidence: dict[str, Any], step: int | str) -> str:
    """Load the weights of a checkpoint of a run; returns their fingerprint.

    Raises: ValueError for weights that were changed.
    """
    file, expected = (evidence[name][str(step)] for name in ("series", "series_sha256"))
    return _load(network, folder / file, expected)


def _load(network: Network, path: Path, weights_sha256: str) -> str:
    if load_weights(network, path) != weights_sha256:
        raise ValueError(f"{path} was changed after it was written; {delete_and_run(path)}")
    return weights_sha256
