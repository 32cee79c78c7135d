"""The datamap as an app in JupyterLab, and as one HTML file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"app": ["explore"], "page": ["write_page"], "state": ["Explorer"]},
)
