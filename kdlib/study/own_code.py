"""Code of a study's own: a Python file that the study names, with its sha256, and trusts in words.

Reading a study names and hashes the file; it runs here, when a run first needs it, and not where
its bytes are others than those named. Leaves to others: what its functions are for (objectives,
selection).
"""

import hashlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from kdlib.repro.files import workspace
from kdlib.study.study import Code


class _Source(importlib.abc.SourceLoader):
    """The very bytes that were hashed: no bytecode beside the file is read or written."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.content


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
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != code.code_sha256:
        raise ValueError(f"{path} was changed while the study runs; start it again")
    name = f"own_{path.stem}_{code.code_sha256[:16]}"
    spec = importlib.util.spec_from_loader(name, _Source(path, content))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[name]
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{path} has no function `{function}`; expected {call}")
    return module
