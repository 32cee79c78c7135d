"""A study file as validated, frozen settings; loads no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "place": ["study_file"],
        "study": ["Study", "load_study", "Cell", "StudyError"],
    },
)
