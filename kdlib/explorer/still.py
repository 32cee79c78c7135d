"""The datamap as a picture, where no widgets can be shown."""

from pathlib import Path

from kdlib.study.study import Study


def still_map(study: Study) -> Path:
    """The datamap as a picture, drawn when there is none or an older one."""
    path, table = study.figures / "datamap.png", study.upstream.runs / "datamap/datamap.parquet"
    if path.exists() and (not table.exists() or path.stat().st_mtime > table.stat().st_mtime):
        return path
    from kdlib.steps.figures import draw_datamap

    return draw_datamap(study)["datamap"]
