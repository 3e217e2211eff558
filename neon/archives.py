"""Zip and npz files: what they claim is checked against their size before anything is unpacked or allocated."""

import math
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from neon import NeonError
from neon.files import reading, regular

KNOWN = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # ways of packing
ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags of a member, and of the directory
LARGE, RATIO = 2**26, 100  # bytes from which on a member may be packed no more than so many times


def check_members(archive: zipfile.ZipFile, path: str | Path, stored: bool = False) -> None:
    """Raises NeonError if a member is encrypted, packed in a way that is not KNOWN, or claims more than there can be.

    stored: it must not be packed at all.
    """
    size, known = Path(path).stat().st_size, {zipfile.ZIP_STORED} if stored else KNOWN
    for member in archive.infolist():
        name, packed = member.filename[:200], member.compress_size
        if member.flag_bits & ENCRYPTED:
            raise NeonError(f"{path}: {name} is encrypted")
        if member.compress_type not in known:
            raise NeonError(f"{path}: {name} is packed in a way that is not read here (method {member.compress_type})")
        if packed > size or (member.compress_type == zipfile.ZIP_STORED and member.file_size != packed):
            raise NeonError(f"{path}: {name} claims {member.file_size:,} bytes, which are not in the file")
        if member.file_size > max(LARGE, RATIO * packed):
            raise NeonError(f"{path}: {name} claims {member.file_size:,} bytes out of {packed:,}")
    if sum(member.compress_size for member in archive.infolist()) > size:
        raise NeonError(f"{path}: its members overlap")


def open_zip(path: str | Path, wrong: str = "not a zip file") -> zipfile.ZipFile:
    """An archive whose members are what check_members allows. Raises NeonError."""
    path = regular(path)
    with reading(path, wrong):
        archive = zipfile.ZipFile(path)
        check_members(archive, path)
    return archive


def read_npz(path: str | Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, of those names or all: numbers only, nothing is unpickled. Raises NeonError."""
    path = regular(path)
    with reading(path, "not an npz file of numbers"), open_zip(path, "not an npz file of numbers") as archive:
        return {name: _array(archive, name) for name in _names(archive.namelist()) if names is None or name in names}


def _names(members: Iterable[str]) -> Iterable[str]:
    return (name.removesuffix(".npy") for name in members if name.endswith(".npy"))


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Raises ValueError if it is no array of numbers, or if its shape is not what its bytes are."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version](file)
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise ValueError(f"{name} is of type {dtype}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{name} claims a shape {shape} that its {member.file_size:,} bytes do not have")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
