"""What makes two runs comparable: seeds, hashed and sealed files, run folders, checks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": ["Run", "open_run", "read_evidence", "read_metrics"],
        "seeds": ["derive", "generator", "torch_seeded"],
    },
)
