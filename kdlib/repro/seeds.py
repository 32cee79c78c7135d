"""Randomness by purpose: a hash of the requested seed and the purpose seeds each generator.

Streams of two purposes and of seeds s and s + 1 are unrelated (NumPy's SeedSequence hashes them).
PyTorch's global generator is restored after use.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

FACTOR_BITS = 12
PURPOSES = (
    "split", "init", "projector", "order", "shards", "augment", "second_view", "subset", "dropout",
    "probe", "bootstrap", "labels", "folds", "threshold", "clusters", "teacher",
)  # fmt: skip


def derive(seed: int, purpose: str, *parts: int) -> int:
    """One 63-bit seed for one purpose of one requested seed.

    Args:
        seed: The requested seed, >= 0; 0 is a seed like any other.
        purpose: One of `PURPOSES`.
        parts: Further integers >= 0 that tell streams of one purpose apart, such as a pass or a
            step.

    Returns: Integer in [0, 2**63).
    Raises: ValueError for a negative seed or an unknown purpose.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}; expected one of {', '.join(PURPOSES)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected an integer >= 0")
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    sequence = np.random.SeedSequence(seed, spawn_key=(name, *parts))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, purpose: str, *parts: int) -> np.random.Generator:
    """A private NumPy generator for one purpose; arguments as in `derive`."""
    return np.random.default_rng(derive(seed, purpose, *parts))


def hashed(example_ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """A pseudo-random number per example that depends on its id, the seed and the purpose only.

    Args:
        example_ids: (N,) int64.

    Returns: (N,) uint64; distinct ids get distinct numbers, and the orders of two seeds are
        unrelated. Source: the mixing function of SplitMix64 (Steele et al., Fast Splittable
        Pseudorandom Number Generators, 2014), applied before and after the key.

    >>> two = hashed(np.array([3, 5]), seed=0, purpose="subset")
    >>> bool(two[1] == hashed(np.array([5]), seed=0, purpose="subset")[0])
    True
    """
    key = np.uint64(derive(seed, purpose))
    return _mix(_mix(np.asarray(example_ids, dtype=np.int64).astype(np.uint64)) ^ key)


def _mix(z: np.ndarray) -> np.ndarray:
    # Array arithmetic on uint64 wraps, as the function wants; every step is a bijection.
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@contextlib.contextmanager
def torch_seeded(seed: int, purpose: str, *parts: int) -> Iterator[None]:
    """Seed PyTorch for a block (weight initialisation, dropout), then restore what was global.

    For code that takes no generator; arguments as in `derive`.
    """
    import torch  # loaded late: most of kdlib draws with NumPy

    # all devices by their numbers: without them PyTorch warns where there are several
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(derive(seed, purpose, *parts))
        yield


def counter_hash(
    seed: int, epochs: ArrayLike, example_ids: ArrayLike, stream: ArrayLike
) -> np.ndarray:
    """Independent-looking 32-bit integers, one per view.

    The mixing function of `hashed` over seed, example id, epoch and stream in turn.

    Args:
        seed: In [0, 2**63).
        epochs: (B,) int64, on the CPU.
        example_ids: (B,) int64, on the CPU.
        stream: Which of the view's parameters is drawn; or (S, 1), several of them.

    Returns: (B,) int64, uniform on [0, 2**32); or (S, B).
    """
    key = np.array([seed], np.uint64)
    for part in (example_ids, epochs, np.atleast_1d(stream)):
        key = _mix(key ^ _mix(np.asarray(part).astype(np.uint64)))
    return (key >> np.uint64(32)).astype(np.int64)
