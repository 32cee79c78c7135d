"""The map of the digits before any training, in JupyterLab (`python -m kdlib demo`).

It is the committed one, and the images are those of scikit-learn: nothing is trained or downloaded.
"""

import importlib.util
import json
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from kdlib.repro import files
from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import open_map
from kdlib.study.load import load_study, study_file

STUDY = "params/digits.yaml"
TEXT = """# The datamap of the digits

Run the cell below (click it, then Shift+Enter). Each point is one of 1,100 handwritten digits, \
placed by how a network learnt it: top left are the digits that it learnt early, on the right \
those on which it changed its mind, bottom left those that it hardly learnt. Hover over a point to \
see its image, and draw around points to see theirs.

This map is committed with the code. `make study` makes it here, with students that learn from \
parts of it; the notebooks beside this one (`make lab`) show each step."""
CODE = f"""from kdlib import open_study

open_study("{STUDY}").explore()"""


def write_demo() -> Path:
    """Cache the digits, and write the notebook that shows their map.

    Returns: The notebook, in `lab/` of the workspace, which git ignores.
    Raises: As `open_map`.
    """
    study = load_study(study_file(STUDY))
    open_map(study, cache_images(study))
    empty = {"metadata": {}, "outputs": [], "execution_count": None}
    cells = [
        {"cell_type": "markdown", "id": "text", "metadata": {}, "source": TEXT},
        {"cell_type": "code", "id": "map", "source": CODE} | empty,
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4}
    path = files.workspace() / "lab" / "demo.ipynb"
    text = json.dumps(notebook | {"nbformat_minor": 5}, indent=1)
    return files.write_atomic(path, lambda file: file.write(text.encode()))


def demo(options: Sequence[str] = ()) -> int:
    """Open the map in JupyterLab, which takes the place of this process; without JupyterLab in the
    browser, as the committed page.

    Args:
        options: Of JupyterLab, such as `--no-browser` or `--port=9999`.

    Raises: ModuleNotFoundError without JupyterLab and page; as `open_map`.
    """
    page = load_study(study_file(STUDY)).figures / "datamap.html"
    if importlib.util.find_spec("jupyterlab") is None:
        if not page.is_file():
            raise ModuleNotFoundError(f"neither JupyterLab nor {page} is here: install JupyterLab")
        print(f"JupyterLab is not installed; the same map as a page: {page}")
        return 0 if webbrowser.open(page.as_uri()) else 1
    notebook, home = write_demo(), files.workspace()
    instead = f"; the same map as a page, without JupyterLab: {page}" if page.is_file() else ""
    print(f"Opening {notebook} in JupyterLab{instead}", flush=True)
    command = ["-m", "jupyterlab", f"--ServerApp.root_dir={home}", str(notebook), *options]
    os.chdir(home)
    os.execv(sys.executable, [sys.executable, *command])
