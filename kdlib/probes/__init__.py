"""How good frozen features are: probes and diagnostics."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "classifiers": ["Features", "linear_probe", "knn_probe", "few_shot_probe"],
        "diagnostics": [
            "effective_rank",
            "collapse",
            "mean_cosine",
            "unit_variance",
            "alignment",
            "uniformity",
            "linear_cka",
        ],
    },
)
