"""The steps behind the notebooks: make what a step makes, or open it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"display": ["Picture", "Text"]}
)
