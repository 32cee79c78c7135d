"""Code of a study's own: a Python file that the study names, with its sha256, and trusts in words.

Reading a study names and hashes the file; it runs here, when a run first needs it, and not where
its bytes are others than those named. Leaves to others: what its functions are for (objectives,
selection).
"""

import importlib.util
from types import ModuleType

from kdlib.files import sha256_file, workspace
from kdlib.params import Code


def run(code: Code, function: str, call: str) -> ModuleType:
    """The file's module, run.

    Args:
        code: Settings whose `code` and `code_sha256` are given.
        function: What the file must define.
        call: How it is called, for the message.

    Raises: ValueError for a file that was changed since the study was read, that fails, or that
        lacks the function.
    """
    path = workspace() / code.code
    if not path.is_file() or sha256_file(path) != code.code_sha256:
        raise ValueError(f"{path} was changed while the study runs; start it again")
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{path} has no function `{function}`; expected {call}")
    return module
