"""kdlib: knowledge distillation with training dynamics; which data should a student learn from?

    from kdlib import open_study
    lab = open_study("params/digits.yaml")

Shape letters used in every docstring: E recorded epochs, N examples, C classes, B batch, D
features, S seeds, V teacher views, K steps. Intervals are half-open. Losses and entropies are in
nats.

An import goes from a room to any room before it in this line, or stays in its room
(`tests/test_structure.py`): repro < study < compare, plots, cache < dataset < models < trainer,
cartography, probes < steps < explorer < lab, __main__.
"""

import lazy_loader

try:
    import fcntl  # noqa: F401  (whose locks keep two processes from writing one run)
except ModuleNotFoundError:
    raise ImportError(
        "kdlib runs on Linux and macOS: this Python has no fcntl, whose locks keep two processes "
        "from writing the same run. On Windows, use it in WSL (Windows Subsystem for Linux)."
    ) from None

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"lab": ["Lab", "open_study"]}
)
