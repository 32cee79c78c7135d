"""Arrays in `.npy` files: written atomically, checked before they are mapped."""

import functools
import io
import math
import os
import tokenize
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kdlib.repro.files import write_atomic

# What NumPy raises for a damaged or hostile .npy file, whose header it parses as Python.
NOT_NPY = (
    ValueError, OSError, EOFError, SyntaxError, TypeError, tokenize.TokenError, OverflowError,
    RecursionError, MemoryError,
)  # fmt: skip


def write_npy(path: Path, array: np.ndarray) -> Path:
    """Write one plain `.npy` file atomically, in C order, with the bytes of `numpy.save`.

    Raises: DiskError where there is no room or no permission; ValueError for an array of objects.
    """
    if array.dtype.hasobject:
        raise ValueError(f"{path}: arrays of {array.dtype} would have to be pickled")
    array = np.asarray(array, order="C")

    def write(file: BinaryIO) -> None:
        file.write(_preamble(array.dtype.str, array.shape))
        file.write(array.data)  # `np.save` loses the error when the last few KiB do not fit

    return write_atomic(path, write)


@functools.cache
def _preamble(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The bytes before the data of an `.npy` file as NumPy writes them."""
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def npy_start(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """The byte at which the data of an `.npy` file begin.

    Args:
        dtype: Of the array it must hold.
        shape: Of that array, which must be in C order and end with the file.

    Raises: FileNotFoundError; ValueError that begins with the path, for a file that is cut, damaged
        or no plain array, or holds another array.
    """
    preamble = _preamble(dtype.str, shape)
    n_bytes = dtype.itemsize * math.prod(shape)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == len(preamble) + n_bytes and file.read(len(preamble)) == preamble:
                return len(preamble)
        # of another version of NumPy, or damaged; pickles and archives are refused
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise
    except NOT_NPY as error:
        raise ValueError(f"{path} is cut or damaged ({error})") from None
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{path} holds {array.dtype.str} {array.shape}; expected {dtype.str} {shape}"
        )
    if size != array.offset + n_bytes or array.offset % dtype.itemsize:
        raise ValueError(
            f"{path} is cut or damaged (it has {size} bytes; expected {array.offset + n_bytes})"
        )
    return array.offset


def map_npy(path: Path, dtype: np.dtype, shape: tuple[int, ...], mode: str = "r") -> np.memmap:
    """Map the array of an `.npy` file; arguments and errors as of `npy_start`.

    Args:
        mode: As of `numpy.memmap`.
    """
    return np.memmap(path, dtype, mode, npy_start(path, dtype, shape), shape)
