"""The log of training dynamics: a network's outputs for each example in each recorded epoch."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from kdlib.cache.sources import check_labels
from kdlib.dataset.images import Images
from kdlib.dataset.plan import Plan
from kdlib.repro import files
from kdlib.repro.commands import delete_and_run, run_to_make
from kdlib.repro.npy import map_npy, write_npy
from kdlib.repro.tables import check_provenance

FORMAT = 2  # 1 had no seal
QUANTITIES = ("gold_prob", "margin", "entropy", "el2n", "loss", "correct")


class DynamicsLog:
    """A network's outputs for each example in each recorded epoch, in memory-mapped `.npy` files.

    A folder with one array per quantity, row = recorded epoch, column = position of the example
    among the sorted ids: `gold_prob`, `margin`, `entropy`, `el2n`, `loss` (E, N) float16 (NaN = not
    recorded), `correct` (E, N) int8 (-1 = not recorded), and `logits` (E, N, C) float16 when asked
    for; beside them `example_ids.npy` (N,) int64 sorted, `labels.npy` (N,) int64, `header.json`
    (written first: what is being recorded) and `index.json` (written last: its presence means
    complete). `log["loss"]` is the array of one quantity.

    float16 resolves probabilities to 0.0005 near 1 and rounds those below 3e-8 to 0.

    Attributes: folder, example_ids, labels, n_epochs, n_examples, n_classes, has_logits, observed
        (`train`: the training pass itself; `eval`: a clean pass after the epoch), provenance.
    """

    def __init__(self, folder: Path, header: dict, arrays: dict[str, np.ndarray]):
        """Hold arrays that are open already; use `create` or `open`."""
        self.folder = folder
        self.n_epochs, self.n_classes = header["n_epochs"], header["n_classes"]
        self.observed, self.provenance = header["observed"], header["provenance"]
        self.example_ids, self.labels = arrays["example_ids"], arrays["labels"]
        self.n_examples, self.has_logits = len(self.example_ids), header["logits"]
        self._header, self._arrays = header, arrays
        # Plain views of flat cells: indexing a memmap object costs several times as much.
        cells = self.n_epochs * self.n_examples
        self._cells = [np.asarray(arrays[q]).reshape(cells) for q in QUANTITIES]
        if self.has_logits:
            self._logit_cells = np.asarray(arrays["logits"]).reshape(cells, self.n_classes)

    def __getitem__(self, quantity: str) -> np.ndarray:
        """The mapped array of one quantity.

        Raises: KeyError for a quantity that is unknown or was not recorded.
        """
        if quantity == "logits" and not self.has_logits:
            raise KeyError(f"{self.folder} holds no logits (study key dynamics.logits: true)")
        if quantity not in (*QUANTITIES, "logits"):
            raise KeyError(f"unknown quantity {quantity!r}; {files.nearest(quantity, QUANTITIES)}")
        return self._arrays[quantity]

    @classmethod
    def create(
        cls,
        folder: Path,
        example_ids: np.ndarray,
        labels: np.ndarray,
        *,
        n_epochs: int,
        n_classes: int,
        observed: str,
        logits: bool,
        provenance: dict,
    ) -> "DynamicsLog":
        """Begin a log, or continue the one in `folder` when it was begun with the same arguments.

        A finished log with the same arguments is reopened too, and is unfinished until `finish` is
        called again, so that a run that was killed right after `finish` can be resumed.

        Args:
            folder: Made when absent.
            example_ids: (N,) int64, strictly increasing; N >= 1.
            labels: (N,) int64 in [0, C).
            n_epochs: E >= 1, the epochs that will be recorded.
            n_classes: C >= 2.
            observed: `train` or `eval`.
            logits: Also keep all logits, 2 * E * N * C bytes.
            provenance: JSON-able; what determines the content (fingerprints of data, split, ...).

        Raises: ValueError for arguments out of range, for a folder begun with other arguments (with
            the difference; nothing is overwritten), and for cut files.
        """
        _check_examples(example_ids, labels, n_classes)
        example_ids, labels = example_ids.astype(np.int64), labels.astype(np.int64)
        header = {
            "format": FORMAT,
            "n_epochs": n_epochs,
            "n_examples": len(example_ids),
            "n_classes": n_classes,
            "observed": observed,
            "logits": logits,
            "provenance": json.loads(files.canonical_json(provenance)),
            "examples_sha256": files.sha256_array(example_ids, labels),
        }
        _begin(folder, header)
        arrays = {"example_ids": example_ids, "labels": labels}
        for name, (dtype, shape) in _layout(header).items():
            path = folder / f"{name}.npy"
            if name not in arrays:
                if not path.exists():
                    _write_unrecorded(path, dtype, shape)
                arrays[name] = _map(path, dtype, shape, "r+")
            elif not path.exists():
                write_npy(path, arrays[name])
        (folder / "index.json").unlink(missing_ok=True)
        return cls(folder, header, arrays)

    @classmethod
    def open(
        cls, folder: Path, provenance: dict | None = None, *, verify: bool = False
    ) -> "DynamicsLog":
        """Map a finished log for reading.

        Args:
            folder: Where `create` put it.
            provenance: The keys the reader expects, e.g. `{"split": ...}`; None accepts any.
            verify: Also compare the sha256 of every file: reads everything once.

        Raises: FileNotFoundError when there is no finished log; ValueError for another format or
            provenance, a cut file, or (`verify`) changed bytes.
        """
        if not (folder / "index.json").exists():
            state = "an unfinished" if (folder / "header.json").exists() else "no"
            finished = (folder.parent / "evidence.json").exists()  # then no step makes it again
            how = delete_and_run(folder) if finished else run_to_make(folder)
            raise FileNotFoundError(f"{folder} holds {state} dynamics log; {how}")
        index = files.read_json(folder / "index.json")
        if index.get("format") not in (1, FORMAT):
            raise ValueError(
                f"{folder} has dynamics log format {index.get('format')}; expected {FORMAT}: "
                f"{delete_and_run(folder)}"
            )
        # format 1 has no seal; one flipped bit does not make a 1 of a 2
        if index["format"] == FORMAT and not files.is_sealed(index):
            raise ValueError(
                f"{folder / 'index.json'} was changed after it was written; "
                f"{delete_and_run(folder)}"
            )
        check_provenance(provenance, index["provenance"], folder / "index.json")
        arrays = {
            name: _map(folder / f"{name}.npy", dtype, shape, "r")
            for name, (dtype, shape) in _layout(index).items()
        }
        if verify and (changed := files.damaged_files(folder, index["sha256"])):
            raise ValueError(
                f"{folder / changed[0]} has changed since it was recorded (sha256 differs); "
                f"{delete_and_run(folder)}"
            )
        return cls(folder, index, arrays)

    def record(
        self,
        epochs: torch.Tensor | np.ndarray,
        positions: torch.Tensor | np.ndarray,
        logits: torch.Tensor | np.ndarray,
        labels: torch.Tensor | np.ndarray,
    ) -> None:
        """Write one batch; a cell written before is overwritten, so that a resumed run may repeat.

        Training is not affected: no gradient, no random number, no module. Computed in float32 on
        the device of `logits`; one small copy to the host (which waits for the device).

        Args:
            epochs: (B,) int64 in [0, E), the recorded epoch of each example.
            positions: (B,) int64 in [0, N), the columns: `np.searchsorted(log.example_ids, ids)`.
            logits: (B, C) float.
            labels: (B,) int64; must equal the log's labels at these positions, which shows that the
                positions belong to this split.

        Raises: ValueError for another shape, an epoch or position out of range, other labels, or
            values float16 cannot hold; nothing of the batch is written.
        """
        # 82 us for B=64, C=10, 115 us for C=100 with logits kept (median of 2000 calls, one thread
        # of a 2-core x86-64 virtual machine, torch 2.15).
        named = {"epochs": epochs, "positions": positions, "labels": labels}
        epochs, positions, labels = (_integers(*item) for item in named.items())
        logits = torch.as_tensor(logits).detach()  # no graph is built from here on
        self._check_batch(epochs, positions, logits, labels)
        if len(positions) == 0:
            return
        values = _observe(logits.float(), torch.as_tensor(labels, device=logits.device))
        kept = logits.half().cpu().numpy() if self.has_logits else values
        if not (np.isfinite(values).all() and np.isfinite(kept).all()):
            raise ValueError(
                f"logits reach {float(logits.abs().max())}, which float16 cannot hold as logits or "
                "loss; expected finite logits: training has diverged (study key training.lr_peak)"
            )
        cells = epochs * self.n_examples + positions  # (B,)
        for array, row in zip(self._cells, values, strict=True):
            array[cells] = row
        if self.has_logits:
            self._logit_cells[cells] = kept

    def _check_batch(
        self, epochs: np.ndarray, positions: np.ndarray, logits: torch.Tensor, labels: np.ndarray
    ) -> None:
        n = len(positions)
        if tuple(logits.shape) != (n, self.n_classes) or len(epochs) != n or len(labels) != n:
            raise ValueError(
                f"got {len(epochs)} epochs, {n} positions, {len(labels)} labels and logits of "
                f"shape {tuple(logits.shape)}; expected one of each per example and "
                f"{self.n_classes} classes"
            )
        ranges = ("epochs", epochs, self.n_epochs), ("positions", positions, self.n_examples)
        for name, values, end in ranges:
            # As unsigned numbers negative ones are huge: one comparison covers both ends.
            if n and values.view(np.uint64).max() >= end:
                raise ValueError(
                    f"{name} span [{values.min()}, {values.max()}]; expected [0, {end - 1}] "
                    f"in {self.folder}"
                )
        wrong = labels != self.labels[positions]
        if wrong.any():
            first = positions[wrong][0]
            raise ValueError(
                f"labels differ from those of the log for {wrong.sum()} of {n} examples (first: id "
                f"{self.example_ids[first]}, label {labels[wrong][0]}, expected "
                f"{self.labels[first]}); positions count in the example_ids of the log"
            )

    def flush(self) -> None:
        """Bring everything recorded so far to the disk; call before saving a checkpoint."""
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()

    def finish(self) -> "DynamicsLog":
        """Check that every cell was recorded, write `index.json`, and return the log for reading.

        Raises: ValueError that counts the cells without a record; the log stays unfinished.
        """
        missing = np.zeros(self.n_epochs, dtype=np.int64)
        for quantity in self._arrays.keys() - {"example_ids", "labels"}:
            for epoch, row in enumerate(self._arrays[quantity]):
                first = row if row.ndim == 1 else row[:, 0]  # the logits of a cell come together
                gaps = first < 0 if quantity == "correct" else np.isnan(first)
                missing[epoch] = max(missing[epoch], np.count_nonzero(gaps))
        if missing.any():
            raise ValueError(
                f"{self.folder}: {missing.sum()} of {self.n_epochs * self.n_examples} cells were "
                f"never recorded, in {np.count_nonzero(missing)} of {self.n_epochs} epochs (first: "
                f"epoch {np.flatnonzero(missing)[0]}); record every example in every epoch, then "
                "finish"
            )
        self.flush()
        names = [f"{name}.npy" for name in _layout(self._header)]
        hashes = {name: files.sha256_file(self.folder / name) for name in names}
        content = {**self._header, "sha256": hashes}
        files.write_json(self.folder / "index.json", files.sealed(content))
        return DynamicsLog.open(self.folder)


def begin_log(
    folder: Path,
    images: Images,
    plan: Plan,
    *,
    observed: str,
    logits: bool = False,
    labels: np.ndarray | None = None,
    n_classes: int | None = None,
    **provenance: str,
) -> DynamicsLog:
    """Begin or go on with the log of one training: `DynamicsLog.create` for every pass of a plan.

    Args:
        labels: (N,) int64 of the plan's examples; None takes those of the images.
        n_classes: None takes that of the images.
        provenance: What determines the content beside the images and their split.
    """
    return DynamicsLog.create(
        folder,
        plan.example_ids,
        images.train.read("labels", plan.example_ids) if labels is None else labels,
        n_epochs=plan.n_passes,
        n_classes=n_classes or images.n_classes,
        observed=observed,
        logits=logits,
        provenance=images.fingerprints | provenance,
    )


def _check_examples(example_ids: np.ndarray, labels: np.ndarray, n_classes: int) -> None:
    is_row = example_ids.dtype.kind in "iu" and example_ids.ndim == 1 and len(example_ids) > 0
    if not is_row or (np.diff(example_ids) <= 0).any():
        raise ValueError(
            f"example_ids are {example_ids.dtype} of shape {example_ids.shape}, or not strictly "
            "increasing; expected a non-empty row of int64: pass np.unique(example_ids)"
        )
    if labels.shape != example_ids.shape:
        raise ValueError(f"{len(labels)} labels for {len(example_ids)} example ids")
    hint = " (a datamap needs labelled examples)"
    check_labels(labels, n_classes, "the log", example_ids, hint)


def _layout(header: dict) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of every array of a log."""
    n_epochs, n_examples = header["n_epochs"], header["n_examples"]
    row, table = (n_examples,), (n_epochs, n_examples)
    layout = {"example_ids": (np.dtype(np.int64), row), "labels": (np.dtype(np.int64), row)}
    for quantity in QUANTITIES:
        layout[quantity] = (np.dtype(np.int8 if quantity == "correct" else np.float16), table)
    if header["logits"]:
        layout["logits"] = (np.dtype(np.float16), (*table, header["n_classes"]))
    return layout


def _begin(folder: Path, header: dict) -> None:
    """Write the header of a new log, or refuse to go on with a log of another header."""
    if (folder / "header.json").exists():
        if lines := files.difference(header, files.read_json(folder / "header.json")):
            raise ValueError(
                f"{folder} holds a dynamics log of other settings (key: there -> requested):\n  "
                + "\n  ".join(lines)
                + "\nuse another folder, or delete this one"
            )
        return
    for stray in folder.glob("*.npy"):  # of a log whose header was deleted
        stray.unlink()
    files.write_json(folder / "header.json", header)


def _write_unrecorded(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Write an array whose cells are all marked as not recorded, under its name when complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with files.writing(path):
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
            with open(temporary, "r+b") as file:
                # writing to a mapped page for which the disk has no room ends the process
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        array[...] = -1 if dtype == np.int8 else np.nan
        array.flush()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...], mode: str) -> np.memmap:
    try:
        return map_npy(path, dtype, shape, mode)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}; {delete_and_run(path.parent)}") from None


def _integers(name: str, values: torch.Tensor | np.ndarray) -> np.ndarray:
    values = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} are {values.dtype} of shape {values.shape}; expected a row of int64"
        )
    return values.astype(np.int64, copy=False)


def _observe(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """The quantities of one batch in the order of `QUANTITIES`: (B, C), (B,) -> (6, B) float16."""
    gold = labels[:, None]
    is_gold = gold == torch.arange(logits.shape[1], device=logits.device)  # (B, C)
    log_probs = torch.log_softmax(logits, dim=1)
    probs = log_probs.exp()
    gold_log_prob = log_probs.gather(1, gold)[:, 0]  # (B, C) -> (B,)
    rival = logits.masked_fill(is_gold, -torch.inf).amax(dim=1)
    rows = [
        gold_log_prob.exp(),
        logits.gather(1, gold)[:, 0] - rival,
        -(probs * log_probs).sum(dim=1),
        torch.linalg.vector_norm(probs - is_gold.to(probs.dtype), dim=1),
        -gold_log_prob,
        (logits.argmax(dim=1) == labels).to(probs.dtype),
    ]
    return torch.stack(rows).half().cpu().numpy()
