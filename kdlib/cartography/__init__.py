"""The scores of each example, the datamap, the rules that select a subset."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "log": ["DynamicsLog"],
        "datamap": ["compute_datamap", "regions"],
        "selection": ["select"],
        "subset": ["Subset"],
        "scores": [
            "confidence",
            "variability",
            "correctness",
            "aum",
            "el2n",
            "forgetting_events",
            "tdds",
            "dual",
        ],
    },
)
