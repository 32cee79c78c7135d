"""Paired statistics, costs, words, committed tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={"sql"},
    submod_attrs={
        "comparisons": ["with_untrained"],
        "differences": ["paired_differences", "objective_differences"],
        "statistics": ["verdict", "seeds_needed"],
    },
)
