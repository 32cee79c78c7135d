"""Matplotlib figures from tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "theme": ["style", "save_figure", "NARROW", "WIDE"],
        "datamaps": ["datamap"],
        "curves": ["learning_curves"],
        "probes": ["probe_curves", "diagnostics"],
        "differences": ["forest_plot_by_student"],
        "images": ["region_grid"],
    },
)
