"""The distillation losses; one step and one loop for teachers and students."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loop": ["train"],
        "step": ["Task"],
        "distiller": ["Distiller"],
        "logit_losses": ["soft_loss", "standardised", "logit_mse", "decoupled", "dist_terms"],
        "feature_losses": ["hint", "attention", "rkd", "similarity", "crd", "tokens", "barlow"],
    },
)
