"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """The name of a new file, which takes the place of ``path`` unless the block fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """The same file, open."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        yield file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written.
    """
    try:
        with replaced(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # by the umask; save_file makes it 0600
            save_file(dict(tensors), temporary, dict(metadata))
            temporary.chmod(mode)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f"{path}: could not be written: {error}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; of a folder: of the names and contents of its files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file_path in sorted(child for child in path.rglob("*") if child.is_file()):
        name = file_path.relative_to(path).as_posix()
        whole.update(f"{name}\n{sha256_of(file_path)}\n".encode())
    return whole.hexdigest()
