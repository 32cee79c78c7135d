"""Images from any source, and teacher outputs, in memory-mapped shards by example id."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "shards": ["Cache", "CacheError"],
        "sources": ["Source", "open_source", "array_source"],
        "build": ["build_images"],
    },
)
