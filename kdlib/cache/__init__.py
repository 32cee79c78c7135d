"""Data sources; images and teacher outputs in memory-mapped shards by example id."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "shards": ["Cache", "CacheError"],
        "sources": ["Source", "array_source"],
        "study_source": ["open_source"],
        "build": ["build_images"],
    },
)
