"""The datamap as an app in JupyterLab."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"app": ["explore"], "state": ["Explorer"]}
)
