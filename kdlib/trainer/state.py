"""Resumable states: tensors and numbers of a training in files that execute no code.

A state is one safetensors file; its numbers lie as JSON in the header. The two newest are kept, so
that a state damaged on the disk costs one interval of work. `loop` decides what a state holds.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kdlib.repro import files

NAME, BEFORE = "state.safetensors", "state.before.safetensors"

# Errors of reading a damaged file
_DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError)


class StateError(RuntimeError):
    """A state from which a training cannot continue."""


def write_state(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], numbers: dict
) -> None:
    """Write a state whole or not at all; the one before it stays beside it.

    Args:
        settings: Of the run, JSON-able; `read_state` compares them.
        numbers: JSON-able.
    """
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    metadata = {"settings": json.dumps(settings), "numbers": json.dumps(numbers)}
    metadata["sha256"] = _content_sha256(plain, metadata)
    data = save(plain, metadata)
    path = folder / NAME
    fresh = folder / f"{NAME}.new"
    files.write_atomic(fresh, lambda file: file.write(data))
    if path.exists():
        path.replace(folder / BEFORE)
    fresh.replace(path)


def read_state(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest whole state of a folder: (tensors, numbers); None when there is none.

    For a damaged state the one before it is read, and a sentence is printed.

    Raises: StateError for a state of other settings, with the difference, or when every state that
        is there is damaged.
    """
    damaged = []
    for path in filter(Path.exists, (folder / NAME, folder / BEFORE)):
        try:
            tensors, numbers, theirs = _read(path)
        except _DAMAGE as error:
            damaged.append(f"{path} is not a whole training state ({files.one_line(error)})")
            continue
        if lines := files.difference(dict(settings), theirs):
            raise StateError(
                f"{path} is of other settings (there -> now): {'; '.join(lines)}; delete "
                f"{folder} to train from step 0"
            )
        for sentence in damaged:
            print(f"{sentence}; going on from the one before it, {path.name}")
        return tensors, numbers
    if damaged:
        raise StateError(f"{'; '.join(damaged)}; delete {folder} to train from step 0")
    return None


def saved_step(folder: Path) -> int:
    """Step of the newest whole state; 0 when there is none."""
    for name in (NAME, BEFORE):
        with contextlib.suppress(*_DAMAGE):
            return int(_read(folder / name)[1]["step"])
    return 0


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["sha256"] != _content_sha256(tensors, metadata):
        raise ValueError("its checksum does not match")
    return tensors, json.loads(metadata["numbers"]), json.loads(metadata["settings"])


def _content_sha256(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, numbers and settings."""
    names = sorted(tensors)
    arrays = files.sha256_array(*(tensors[name].numpy() for name in names))
    return files.fingerprint([names, arrays, metadata["numbers"], metadata["settings"]])
