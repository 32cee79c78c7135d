"""The scores of each example, the datamap, the rules that select a subset."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "log": ["DynamicsLog"],
        "datamap": ["compute_datamap", "ranked", "regions"],
        "imported": ["read_dynamics_json", "random_split_ids"],
        "selection": ["select"],
        "subset": ["Subset"],
        "scores": [
            "confidence",
            "variability",
            "correctness",
            "forgetting_events",
            "never_learned",
            "aum",
            "el2n",
            "entropy",
            "loss",
            "trend",
            "dyn_unc",
            "dual",
            "tdds",
        ],
        "feature_scores": ["class_distance", "prototypicality"],
        "gradients": ["gradient_norms"],
    },
)
