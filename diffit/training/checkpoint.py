"""Checkpoints that are whole or not there.

``FOLDER/00001000`` holds what torch.distributed.checkpoint wrote, a file per process, and a
manifest with the SHA-256 of every file. It is written under another name, synced to disk, and
renamed. A folder that does not match its manifest is refused, and the one before it is used.
Any number of processes, with replicas or shards, can read what any other number wrote.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from diffit.files import sha256_of
from diffit.ranks import Ranks

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
# What the index of torch.distributed.checkpoint is made of, by module.
KNOWN_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_device_mesh"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run.

    Args:
        folder: that holds them.
        keep: how many of the newest stay; the one with the lowest loss stays too.
        ranks: the processes, all of which call the methods.
    """

    folder: Path
    keep: int
    ranks: Ranks

    def save(self, step: int, loss: float, state: Mapping[str, Tensor]) -> None:
        """Write one, then delete those that are not kept.

        Args:
            step: its name.
            loss: the mean since the last one, to find the best.
            state: tensors, whole or sharded.

        Raises:
            OSError: it could not be written; those before it are as they were.
        """
        temporary = self.folder / f"{TEMPORARY}{step:08d}"
        if self.ranks.first:
            for left in self.folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(left)
            temporary.mkdir(parents=True)
        self.ranks.all(None)
        try:
            with _quiet():
                save_sharded(
                    dict(state),
                    storage_writer=FileSystemWriter(temporary),
                    no_dist=self.ranks.size == 1,
                )
            digests = self.ranks.all(self._digests(temporary))
            if self.ranks.first:
                _write_manifest(temporary, loss, digests)
                final = self.folder / f"{step:08d}"
                if final.exists():  # refused when the run went on
                    shutil.rmtree(final)
                temporary.rename(final)
                _sync(self.folder)
                self._delete_old()
        except (CheckpointException, RuntimeError, OSError) as error:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"{temporary}: could not be written: {_reason(error)}") from error
        self.ranks.all(None)

    def load(self, state: dict[str, Tensor]) -> tuple[int | None, list[str]]:
        """Read the newest that is whole into the tensors of the state.

        Returns:
            Its step, None if there are no checkpoints, and why newer ones were refused.

        Raises:
            ValueError: there are some and none is whole, or it holds another network.
        """
        step, refused = self.ranks.from_first(self._newest() if self.ranks.first else None)
        if step is None:
            if refused:
                raise ValueError(f"no whole checkpoint: {'; '.join(refused)}")
            return None, refused
        path = self.folder / f"{step:08d}"
        try:
            with _quiet():
                load_sharded(state, storage_reader=_Reader(path), no_dist=self.ranks.size == 1)
        except (CheckpointException, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: does not fit this run: {_reason(error)}") from error
        return step, refused

    def there(self) -> bool:
        """Whether there are any."""
        return bool(self._all())

    def _newest(self) -> tuple[int | None, list[str]]:
        refused: list[str] = []
        for path in reversed(self._all()):
            reason = _why_broken(path)
            if reason is None:
                return int(path.name), refused
            refused.append(f"{path}: {reason}")
        return None, refused

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdecimal())

    def _digests(self, path: Path) -> dict[str, str]:
        """Of what this process wrote, and for the first also of the index."""
        mine = [*path.glob(f"__{self.ranks.rank}_*")]
        if self.ranks.first:
            mine.append(path / ".metadata")
        return {file.name: sha256_of(file) for file in mine}

    def _delete_old(self) -> None:
        losses = {}
        for path in self._all():
            try:
                losses[path] = float(json.loads((path / MANIFEST).read_text())["loss"])
            except (OSError, ValueError, TypeError, KeyError):
                losses[path] = float("inf")  # broken; goes as the others do
        old = list(losses)[: -self.keep]
        best = min(losses, key=lambda path: losses[path])
        for path in old:
            if path != best:
                # Without its manifest it is no checkpoint, whatever is left of it.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)


def _write_manifest(path: Path, loss: float, digests: list[dict[str, str]]) -> None:
    files = {name: digest for some in digests for name, digest in some.items()}
    with (path / MANIFEST).open("w") as file:
        json.dump({"loss": loss, "sha256": files}, file)
        file.flush()
        os.fsync(file.fileno())
    _sync(path)


def _why_broken(path: Path) -> str | None:
    try:
        digests = json.loads((path / MANIFEST).read_text())["sha256"]
    except FileNotFoundError:
        return f"no {MANIFEST} in it"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    if not isinstance(digests, dict) or not digests:
        return f"{MANIFEST}: sha256: expected the files' digests, got {digests!r}"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != digest:
            return f"{name} does not have the SHA-256 of the manifest"
    return None


def _sync(folder: Path) -> None:
    """Put the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process has no others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """The first failure in one line, without the traces."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _Unpickler(pickle.Unpickler):
    """Takes what an index is made of, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and (module in KNOWN_MODULES or (module, name) in KNOWN):
            return super().find_class(module, name)
        if module == "torch" and name.startswith(("float", "bfloat", "int", "uint", "bool")):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"the index holds {module}.{name}")


def _member(kind: Any, name: str) -> Any:
    """That of an enumeration, which Python before 3.11.4 names by ``getattr``; nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"the index holds builtins.getattr of {kind!r:.40}")
    return kind[name]


class _Reader(FileSystemReader):
    """Reads tensors with ``weights_only``, as its base does, and the index as safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
