"""Python files of the user (`kind: own`), named by the study with their sha256 and run here.

`pin` hashes the file when a study is loaded. `run` executes it when a run first needs it, and
refuses bytes of another sha256.
"""

import contextlib
import hashlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from pydantic import Field

from kdlib.repro.files import sha256_file, workspace
from kdlib.study.base import Settings, StudyError


class UserCode(Settings):
    """Settings of an objective or a selection that a Python file of the user defines."""

    code: str
    """The file, relative to the workspace."""
    code_sha256: str | None = None
    """Of the file; without it the sha256 that the file has when the study is read."""
    trust_code: Literal[True]
    """The file runs here, as the user who runs the study."""
    options: dict[str, float] = Field(default_factory=dict)
    """Numbers for its functions."""


MOST_BYTES = 2**18  # of a code file
Pinned = TypeVar("Pinned", bound=UserCode)


def pin(settings: Pinned, where: str) -> Pinned:
    """The settings with the sha256 of their file.

    Args:
        where: Their place in the study, for messages.

    Raises: StudyError for a file that is not there or has another sha256 than is written.
    """
    path, sha256 = workspace() / settings.code, None
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        if path.is_file() and path.stat().st_size <= MOST_BYTES:
            sha256 = sha256_file(path)
    if sha256 is None:
        raise StudyError(
            f"{where}.code: no file {str(path)[:500]} that can be read; expected a Python file of "
            f"at most {MOST_BYTES:,} bytes"
        )
    if settings.code_sha256 not in (None, sha256):
        raise StudyError(
            f"{where}.code: {path} has sha256 {sha256}; expected {settings.code_sha256}: read what "
            "it does now, then write its new sha256, or leave `code_sha256` out"
        )
    return settings.model_copy(update={"code_sha256": sha256})


class _Source(importlib.abc.SourceLoader):
    """Loads the bytes that were hashed; no bytecode beside the file is read or written."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.content


def run(code: UserCode, function: str, call: str) -> ModuleType:
    """The file's module, executed.

    Args:
        code: Settings with `code_sha256`, from `pin`.
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
