"""Weight files in a format that cannot execute code: reading, writing, fingerprints."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kdlib.repro import files

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".tar")
# What wrappers, compilation and trainers put before the names of a network's weights.
PREFIXES = (
    "module", "_orig_mod", "model", "network", "net", "student", "teacher", "ema", "backbone",
    "encoder",
)  # fmt: skip
BODY = "body."  # before the names of a network of timm
# Of the last layer in a file: `needed` as the network has it; `optional`, where the file may have
# none; `any`, where the file's may also be for another number of classes, which is left out.
Head = Literal["needed", "optional", "any"]


@dataclass(frozen=True)
class Read:
    """What was read into a network.

    Attributes:
        weights_sha256: The fingerprint of the network's weights afterwards.
        head: Whether they have the last layer.
        notes: What was done to names and numbers.
    """

    weights_sha256: str
    head: bool
    notes: tuple[str, ...]


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
    with `weights_only`. The state dict may lie in a mapping (`{"model": ..., "epoch": 3}`), its
    names may all begin with `module.`, `_orig_mod.` or another of `PREFIXES`, its floats may have
    another precision, and BatchNorm's counters `num_batches_tracked` may be missing; they become 0.
    Of a network of timm the names may be timm's own. Beside names with a prefix there may be others
    without it, which are left out, as is the last layer of a classifier where the network has none.
    A printed line says which of these was the case.

    Returns: The fingerprint of the loaded weights.
    Raises: FileNotFoundError; ValueError for a file that is cut, holds more than tensors, holds the
        network's names more than once, or whose names, shapes or types are not the network's. The
        network is then unchanged.
    """
    return read_weights(network, path).weights_sha256


def read_weights(network: nn.Module, path: Path, head: Head = "needed") -> Read:
    """As `load_weights`, of a file whose last layer may be missing or another: the network then
    keeps its own."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weight file {path}; give the path of a .safetensors file, absolute or "
            "inside the data folder (KDLIB_DATA)"
        )
    is_checkpoint = path.suffix.lower() in CHECKPOINTS
    content = _checkpoint(path) if is_checkpoint else _safetensors(path)
    expected = network.state_dict()
    names = [key for _, state in _states(content) for key in state]
    # timm's own files do not know that the network here is the body of another
    wrapped = all(key.startswith(BODY) for key in expected)
    inner = BODY if wrapped and not any(BODY in key for key in names) else ""
    expected = {key.removeprefix(inner): value for key, value in expected.items()}
    place, state = _only_state(content, expected, path)
    prefix, loaded = _without_prefix(state, expected, path)
    notes = [f"took `{place}`"] if place else []
    notes += [f"removed the prefix {prefix}"] if prefix else []
    if beside := sorted(state.keys() - {prefix + key for key in loaded}):
        notes.append(f"left out {len(beside)} without it ({', '.join(beside[:3])})")
    notes += [f"added the prefix {inner}"] if inner else []
    loaded = {inner + key: value for key, value in loaded.items()}
    read = adopt(network, loaded, str(path), head, notes)
    if read.notes:
        print(f"{path}: read {len(state)} tensors; {'; '.join(read.notes)}")
    return read


def adopt(
    network: nn.Module,
    loaded: dict[str, Tensor],
    source: str,
    head: Head = "needed",
    notes: list[str] | None = None,
) -> Read:
    """Put tensors into a network whose names they have.

    Args:
        source: What a message calls them.
        notes: What was done to them before.

    Raises: ValueError where names, shapes or types are not the network's, which is then unchanged.
    """
    expected, notes = network.state_dict(), list(notes or ())
    if surplus := _last_layer(network, loaded.keys() - expected.keys(), loaded):
        notes.append(f"left out the last layer, {', '.join(surplus)}")
        loaded = {key: value for key, value in loaded.items() if key not in surplus}
    last = set() if head == "needed" else network.last_names()
    others = {loaded[k].shape[0] for k in last & loaded.keys() if not _like(loaded, expected, k)}
    is_kept = bool(last) and (not last & loaded.keys() or (head == "any" and len(others) == 1))
    if is_kept:
        of = f"left out the last layer, of {others.pop()} classes" if others else "no last layer"
        notes.append(of)
        expected, loaded = (
            {k: v for k, v in state.items() if k not in last} for state in (expected, loaded)
        )
    cast = [k for k in loaded.keys() & expected.keys() if _other_float(loaded[k], expected[k])]
    if cast:
        kinds = ", ".join(sorted({str(loaded[k].dtype).removeprefix("torch.") for k in cast}))
        notes.append(f"converted {len(cast)} from {kinds}")
        loaded |= {key: loaded[key].to(expected[key].dtype) for key in cast}
    counters = [k for k in expected.keys() - loaded.keys() if k.endswith("num_batches_tracked")]
    notes += [f"set {len(counters)} missing counters of BatchNorm to 0"] if counters else []
    loaded |= {key: torch.zeros_like(expected[key], device="cpu") for key in counters}
    _demand_fit(network, expected, loaded, source)
    network.load_state_dict(loaded, strict=not is_kept)
    return Read(weights_fingerprint(network), not is_kept, tuple(notes))


def _like(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor], key: str) -> bool:
    """Whether a tensor has the network's shape, or differs in more than its number of rows."""
    ours, theirs = expected[key].shape, loaded[key].shape
    return ours == theirs or ours[1:] != theirs[1:]


def _last_layer(
    network: nn.Module, surplus: Collection[str], loaded: Mapping[str, Tensor]
) -> list[str]:
    """Names of a linear layer over the features that a network without a classifier has not; empty
    where more than that is too many."""
    layers = {key.rpartition(".")[0] for key in surplus}
    if getattr(network, "n_classes", None) != 0 or len(layers) != 1:
        return []
    weight = loaded.get(f"{layers.pop()}.weight")
    fits = weight is not None and weight.shape[1:] == (network.n_features,)
    return sorted(surplus) if fits else []


def _only_state(
    content: Any, expected: Mapping[str, Tensor], path: Path
) -> tuple[str, dict[str, Tensor]]:
    """The one mapping in a file that has names of the network, and its place there."""
    states = list(_states(content))
    fitting = [s for s in states if any(_bare(key, expected) in expected for key in s[1])]
    if len(candidates := fitting or states) > 1:
        places = ", ".join(f"`{place}`" if place else "the top" for place, _ in candidates)
        raise ValueError(
            f"{path} holds tensors by name at {len(candidates)} places: {places}; expected one: "
            "save the state_dict that is meant as a file of its own"
        )
    place, state = candidates[0] if candidates else ("", {})
    beside = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if not candidates or beside:
        held = f"tensors beside {', '.join(map(repr, beside[:3]))}" if beside else "no tensors"
        raise ValueError(
            f"{path} holds {held} ({type(content).__name__}); expected tensors by name: save the "
            "network's state_dict alone"
        )
    return place, dict(state)


def _states(content: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings in a file that have tensors by name, each with its place: `a.b` is
    content["a"]["b"]."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return
    if any(isinstance(value, Tensor) for value in content.values()):
        yield place, content
    for key, value in content.items() if depth else ():
        yield from _states(value, f"{place}.{key}".removeprefix("."), depth - 1)


def _bare(key: str, expected: Mapping[str, Tensor]) -> str:
    """A name without the prefixes of wrappers, where the network has the name that is left."""
    name = key
    while name not in expected and name.partition(".")[0] in PREFIXES:
        name = name.partition(".")[2]
    return name if name in expected else key


def _without_prefix(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> tuple[str, dict[str, Tensor]]:
    """The prefix that all names of the network have in a file, and the tensors without it."""
    bare = {key: _bare(key, expected) for key in state}
    prefixes = Counter(key.removesuffix(name) for key, name in bare.items() if name in expected)
    if len(prefixes) > 1:
        found = ", ".join(f"{n} with {p or 'no prefix'}" for p, n in sorted(prefixes.items()))
        raise ValueError(
            f"{path} holds names of this network with different prefixes: {found}; expected one "
            "set of names: save the state_dict that is meant as a file of its own"
        )
    prefix = next(iter(prefixes), "")
    return prefix, {bare[k]: value for k, value in state.items() if k.startswith(prefix)}


def _other_float(value: Tensor, like: Tensor) -> bool:
    return value.dtype != like.dtype and value.is_floating_point() and like.is_floating_point()


def _demand_fit(
    network: nn.Module, expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor], source: str
) -> None:
    ours, theirs = (
        {key: f"{v.dtype} {tuple(v.shape)}" for key, v in state.items()}
        for state in (expected, loaded)
    )
    faults = files.difference(ours, theirs)
    if not faults:
        return
    remedy = "name the model, with its options, that these weights are of"
    wrong = [key for key in ours if ours[key] != theirs.get(key)]
    if ours.keys() == theirs.keys() and (n_classes := getattr(network, "n_classes", 0)):
        rows = {tuple(loaded[k].shape[:1]) for k in wrong if expected[k].shape[:1] == (n_classes,)}
        tails = all(loaded[k].shape[1:] == expected[k].shape[1:] for k in wrong)
        if tails and len(rows) == 1 and len(wrong) <= 2:  # the last layer's weight and bias
            remedy = (
                f"these are weights for {rows.pop()[0]} classes, and this study has {n_classes}: "
                "train the network on the study's classes (teacher.training), or give weights that "
                "were, or, for a teacher of features, weights without their last layer"
            )
    raise ValueError(
        f"{source} does not fit this {type(network).__name__}; in {len(faults)} keys the file "
        f"differs (file -> network): {', '.join(faults[:6])}{', ...' * (len(faults) > 6)}; {remedy}"
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError:
        with open(path, "rb") as file:
            begins = file.read(2)
        if begins in (b"PK", b"\x80\x02"):  # an archive or a pickle of torch.save
            what = f"it begins as a PyTorch checkpoint: rename it to {path.stem}.pt if it is one"
        else:
            what = f"cut or damaged, {path.stat().st_size:,} bytes: copy it again"
        raise ValueError(
            f"{path} is not a whole safetensors file ({what}); a PyTorch checkpoint is recognised "
            f"by its suffix ({', '.join(CHECKPOINTS)})"
        ) from None


def _checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, which torch does not name
        # torch's text advises to load it with code, and is not passed on
        kinds = re.findall(r"(?:GLOBAL|global:?) `?([a-zA-Z_][\w.]*\.\w+)", str(error))
        names = f" ({', '.join(dict.fromkeys(kinds))})" if kinds else ""
        raise ValueError(
            f"{path} is cut, or holds more than tensors{names}, which could execute code and is "
            f"not read ({path.stat().st_size:,} bytes, {type(error).__name__}); copy it again if "
            "it was cut; else save its state_dict alone, or as safetensors, with the program that "
            "made it"
        ) from None
