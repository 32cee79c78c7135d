"""A papermill engine whose kernels talk over Unix sockets: `papermill --engine ipc ...`.

papermill's default engine chooses free TCP ports and closes them before the kernel binds them, so
that two notebooks started at the same moment can get the same port, and one of them fails. The
pipeline starts many notebooks at once. Parameters that the notebook does not have are refused
before a kernel starts. This is the only module that imports papermill, and only when asked for its
engine: papermill asks at the end of its own import, before which no class of it can be inherited.

    python -m kdlib.papermill_engine IN OUT -p NAME VALUE

is papermill's command with this engine, and starts in a quarter of the time.
"""

import os
import sys
import tempfile
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from traitlets.config import Config

from kdlib.study.parameters import assigned, refuse_unknown

LONGEST = 80  # characters of a folder in which `kernel-xxxxxxxx/socket-1` fits a socket's 107


def __getattr__(name: str) -> type:
    """`IpcEngine`: papermill's engine, with each kernel's Unix sockets in a separate folder."""
    if name != "IpcEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from papermill.engines import NBClientEngine

    globals()[name] = type(name, (_Ipc, NBClientEngine), {"__doc__": __getattr__.__doc__})
    return globals()[name]


class _Ipc:
    """What the engine does before and instead of papermill's."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        """Execute a notebook; arguments as papermill's default engine.

        Raises: ValueError for a parameter that the notebook's parameters cell does not set, or a
            kernel that is not here.
        """
        if kernel_name not in (known := KernelSpecManager().find_kernel_specs()):
            raise ValueError(
                f"this notebook asks for the kernel {kernel_name!r}, which is not here; there are "
                f"{', '.join(known) or 'none'}: give one of them with `papermill -k NAME`, or run "
                f"`{sys.executable} -m ipykernel install --sys-prefix --name {kernel_name}`"
            )
        cells = [c for c in nb_man.nb.cells if "parameters" in c.metadata.get("tags", ())]
        if cells:
            given = nb_man.nb.metadata.get("papermill", {}).get("parameters", {})
            refuse_unknown(given, set().union(*(assigned(cell.source) for cell in cells)))
        # a cluster's $TMPDIR can be too long a path for a socket
        place = None if len(os.fsencode(tempfile.gettempdir())) <= LONGEST else "/tmp"
        with tempfile.TemporaryDirectory(prefix="kernel-", dir=place) as folder:
            # without a separate path all kernels would use the same names in the current folder
            sockets = {"transport": "ipc", "ip": os.path.join(folder, "socket")}
            config = Config({"KernelManager": sockets})
            super().execute_managed_notebook(nb_man, kernel_name, config=config, **options)


if __name__ == "__main__":
    # what papermill imports where it is there: for schemas with an IRI, and for files of Hadoop
    sys.modules |= dict.fromkeys(("rfc3987_syntax", "pyarrow"))
    from papermill.cli import papermill

    papermill(["--engine", "ipc", *sys.argv[1:]], prog_name="papermill")
