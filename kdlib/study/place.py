"""Where a study file is looked for."""

import os
from pathlib import Path

from kdlib.repro.files import workspace


def study_file(path: str | Path) -> Path:
    """The absolute path of a study file: as given when it is absolute, else relative to the current
    folder, else relative to the workspace.

    Raises: FileNotFoundError that lists the studies there are.
    """
    for candidate in (Path(path), workspace() / path):
        if candidate.is_file():
            return Path(os.path.abspath(candidate))
    known = sorted(p.name for p in (workspace() / "params").glob("*.yaml"))
    raise FileNotFoundError(
        f"no study file {str(path)!r}; params/ has {', '.join(known) or 'none'}"
    )
