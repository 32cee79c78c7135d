"""Which example a training step sees, and as which view."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["Images"],
        "plan": ["Plan"],
        "batch": ["View"],
        "loader": ["Loader"],
        "pixels": ["Pixels"],
        "torch_adapters": ["ImageDataset", "PlanSampler"],
    },
)
