"""Weight files in a format that cannot execute code: reading, writing, fingerprints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kdlib.repro import files

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".tar")


def weights_fingerprint(network: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 (64 hex digits) over the sorted names, dtypes, shapes and bytes of all weights and
    buffers of a network or state dict, whatever their device and memory format.

    >>> weights_fingerprint({"w": torch.zeros(2)}) == weights_fingerprint({"w": torch.ones(2)})
    False
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(_state(network).items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state(network: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors by name."""
    state = network.state_dict() if isinstance(network, nn.Module) else network
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def save_weights(
    network: nn.Module | Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> str:
    """Write weights and buffers as safetensors; the same content gives the same bytes.

    Args:
        metadata: Strings by string, kept in the file's header.

    Returns: The weights' fingerprint.
    """
    state = {key: tensor.clone() for key, tensor in _state(network).items()}  # none share memory
    content = safetensors.torch.save(state, {"format": "pt", **metadata})
    # safetensors writes the header's metadata in no fixed order: sort it.
    end = 8 + int.from_bytes(content[:8], "little")
    header = files.canonical_json(json.loads(content[8:end])).encode()
    header += b" " * (-len(header) % 8)
    sorted_content = len(header).to_bytes(8, "little") + header + content[end:]
    files.write_atomic(path, lambda file: file.write(sorted_content))
    return weights_fingerprint(state)


def load_weights(network: nn.Module, path: Path) -> str:
    """Read a weight file into a network, whose weights it must hold exactly.

    A file is safetensors, or a PyTorch checkpoint of tensors (.pt, .pth, .ckpt, .bin, .tar), read
    with `weights_only`. A `state_dict`, `model_state_dict`, `model` or `net` inside it is
    unwrapped, and the prefix `module.` of DistributedDataParallel removed. BatchNorm counters
    `num_batches_tracked` may be missing; they become 0.

    Returns: The fingerprint of the loaded weights.
    Raises: FileNotFoundError; ValueError for a file that is cut, holds more than tensors, or whose
        keys, shapes or dtypes are not the network's. The network is then unchanged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weight file {path}; give the path of a .safetensors file, absolute or "
            "inside the data folder (KDLIB_DATA)"
        )
    loaded = _checkpoint(path) if path.suffix in CHECKPOINTS else _safetensors(path)
    expected = network.state_dict()
    for key in expected.keys() - loaded.keys():
        if key.endswith("num_batches_tracked"):
            loaded[key] = torch.zeros_like(expected[key], device="cpu")
    ours, theirs = (
        {key: f"{v.dtype} {tuple(v.shape)}" for key, v in state.items()}
        for state in (expected, loaded)
    )
    faults = files.difference(ours, theirs)
    if faults:
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}; in {len(faults)} keys the file "
            f"differs (file -> network): {', '.join(faults[:6])}{', ...' * (len(faults) > 6)}; "
            "name the model that these weights are of"
        )
    network.load_state_dict(loaded)
    return weights_fingerprint(network)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy it again if it was cut; a "
            f"PyTorch checkpoint is recognised by its suffix ({', '.join(CHECKPOINTS)})"
        ) from None


def _checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, which torch does not name
        raise ValueError(
            f"{path} is cut, or holds more than tensors, which could execute code and is not read "
            f"({files.one_line(error)}); save its state_dict alone, or as safetensors"
        ) from None
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__}; expected tensors by name")
    return {key.removeprefix("module."): value for key, value in content.items()}
