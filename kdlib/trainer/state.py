"""Resumable states: tensors and numbers of a training in files that execute no code.

A state is one safetensors file; its numbers lie as JSON in the header. The two newest are kept, so
that a state damaged on the disk costs one interval of work. Leaves to others: what belongs into a
state (`trainer`).
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


# What a file that is no whole state may raise.
_DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError)


class StateError(RuntimeError):
    """A state that cannot be gone on from."""


def write_state(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], numbers: dict
) -> None:
    """Write a state whole or not at all; the one before it stays beside it.

    Args:
        settings: What the training was asked for; `read_state` compares.
        numbers: JSON-able.
    """
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    told = {"settings": json.dumps(settings), "numbers": json.dumps(numbers)}
    told["sha256"] = _content_sha256(plain, told)
    data = save(plain, told)
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

    A damaged state is passed over for the one before it, and said.

    Raises: StateError for a state of other settings, with the difference, or when every state that
        is there is damaged.
    """
    damaged = []
    for name in (NAME, BEFORE):
        path = folder / name
        if not path.exists():
            continue
        try:
            tensors, numbers, theirs = _read(path)
        except _DAMAGE as error:
            damaged.append(f"{path} is not a whole training state ({error})")
            continue
        if lines := files.difference(dict(settings), theirs):
            raise StateError(
                f"{path} is of other settings (there -> now): {'; '.join(lines)}; delete it to "
                "train from step 0"
            )
        for sentence in damaged:
            print(f"{sentence}; going on from the one before it, {path.name}")
        return tensors, numbers
    if damaged:
        raise StateError(f"{'; '.join(damaged)}; delete it to train from step 0")
    return None


def saved_step(folder: Path) -> int:
    """Step of the newest whole state; 0 when there is none."""
    for name in (NAME, BEFORE):
        with contextlib.suppress(*_DAMAGE):
            return int(_read(folder / name)[1]["step"])
    return 0


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    with safe_open(path, "pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if told["sha256"] != _content_sha256(tensors, told):
        raise ValueError("its checksum does not match")
    return tensors, json.loads(told["numbers"]), json.loads(told["settings"])


def _content_sha256(tensors: Mapping[str, torch.Tensor], told: Mapping[str, str]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, numbers and settings."""
    names = sorted(tensors)
    arrays = files.sha256_array(*(tensors[name].numpy() for name in names))
    return files.fingerprint([names, arrays, told["numbers"], told["settings"]])
