"""Networks, their weights, their outputs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Network"],
        "networks": ["build_network"],
        "weights": ["load_weights", "save_weights"],
        "evaluation": ["evaluate"],
        "live": ["LiveOutputs"],
    },
)
