"""Named, private randomness: every random choice has a purpose, and every purpose its own
generator.

Two purposes never share a stream, seeds s and s + 1 are unrelated (NumPy's SeedSequence hashes
them), and PyTorch's global generator is left as it was found.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch

PURPOSES = (
    "split", "init", "projector", "order", "shards", "augment", "second_view", "subset", "dropout",
    "probe", "bootstrap",
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


@contextlib.contextmanager
def torch_seeded(seed: int, purpose: str, *parts: int) -> Iterator[None]:
    """Run a block under its own PyTorch seed (weight initialisation, dropout), then restore the
    global generators.

    For code of others that takes no generator; arguments as in `derive`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, purpose, *parts))
        yield
