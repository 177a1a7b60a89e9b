"""Networks from files and back: one safetensors file holds weights and configuration.

Published files of the latent network load as they are; their configuration is read off the
shapes. Files are mapped into memory, so a network takes no more of it than it uses.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffit.files import save_tensors

# Of the repository nvidia/DiffiT, by input_size.
PUBLISHED_FILES = {32: "diffit_256.safetensors", 64: "diffit_512.safetensors"}
HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
METADATA = "diffit"
SHOWN_KEYS = 3
NOTES = {"network": (str, "a name"), "config": (dict, "an object"), "preset": (str, "a name")}
# What arguments of a constructor raise that do not fit.
NO_CONFIG = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Shapes = Mapping[str, tuple[int, ...]]


class Pretrained(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="diffit",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2312.02139",
):
    """A network with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

    LABEL_KEYS: tuple[str, ...] = ()  # parameters whose shape depends on the number of classes

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | os.PathLike[str], **options: Any
    ) -> Self:
        """Load a network, in evaluation mode, on the CPU, in the dtype of the file.

        Args:
            source: a safetensors file, a folder of ``save_pretrained``, or the id of a repository
                on the Hugging Face hub. ``nvidia/DiffiT`` gives the published network for
                256 pixels, with ``input_size=64`` the one for 512.
            options: arguments of the constructor that shall differ from the file's. With other
                classes (``num_classes``, ``label_dim``) the parameters of the labels start anew
                and a warning says so; everything else has to fit. Also those of
                huggingface_hub: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            ValueError: a file that is cut off, foreign, or does not fit, naming the keys.
            OSError: no such file or repository.
        """
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        path = find_weights(source, options.get("input_size", 32), **hub)
        return cls._from_file(path, options)

    @classmethod
    def _from_file(cls, path: Path, options: Mapping[str, Any]) -> Self:
        state, metadata = read_weights(path), read_metadata(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if "config" in metadata:
            if metadata["network"] != cls.__name__:
                raise ValueError(f"{path}: holds {metadata['network']}, not {cls.__name__}")
            config = metadata["config"]
        else:
            config = cls._infer_config(path, shapes)
        try:
            with torch.device("meta"):
                model = cls(**{**config, **options})
        except NO_CONFIG as error:
            raise ValueError(f"{path}: its config makes no {cls.__name__}: {error}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        renewed = [name for name in cls.LABEL_KEYS if shapes.get(name) != expected.get(name)]
        for name in renewed:
            state.pop(name, None)
            if name in expected:
                like = next(iter(state.values()), torch.empty(0))
                state[name] = nn.init.normal_(like.new_empty(expected[name]), std=0.02)
        _require_keys(path, expected, {name: tuple(value.shape) for name, value in state.items()})
        if renewed:
            warnings.warn(
                f"{path}: another number of classes, so these start anew: {', '.join(renewed)}",
                stacklevel=3,
            )
        model.load_state_dict(state, assign=True)
        return model.eval()

    @classmethod
    def _infer_config(cls, path: Path, shapes: Shapes) -> dict[str, Any]:
        raise ValueError(
            f"{path}: no configuration of {cls.__name__} in its metadata; it holds "
            f"{_some(sorted(shapes))}"
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(self, save_directory / SAFETENSORS_SINGLE_FILE)


def save_weights(model: Pretrained, path: Path, **notes: str) -> None:
    """Write weights and configuration of a network to one file, whole or not at all.

    Args:
        model: the network.
        path: of the safetensors file; ``from_pretrained(path)`` reads it.
        notes: more for the metadata, for example ``preset="diffit_emoji_32"``.

    Raises:
        OSError: it could not be written.
    """
    metadata = {"network": type(model).__name__, "config": model._hub_mixin_config, **notes}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(path, state, {"format": "pt", METADATA: json.dumps(metadata)})


def is_on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether this is no path here but may be OWNER/NAME, a repository on the hub."""
    path = Path(source)
    part = r"\w([\w.-]*\w)?"
    named = re.fullmatch(f"{part}/{part}", str(source)) is not None
    return named and path.suffix != ".safetensors" and not path.exists()


def find_weights(source: str | os.PathLike[str], input_size: int = 32, **hub_options: Any) -> Path:
    """The safetensors file of a file, a folder or a repository on the hub, fetched if need be.

    Args:
        source: as for ``Pretrained.from_pretrained``.
        input_size: which of the published networks, in a repository that holds both.
        hub_options: of ``huggingface_hub.hf_hub_download``.

    Raises:
        OSError: there is none.
    """
    path = Path(source)
    if path.is_dir():
        path = path / SAFETENSORS_SINGLE_FILE
    if path.is_file():
        return path
    if not is_on_hub(source):
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        try:
            return Path(hf_hub_download(str(source), SAFETENSORS_SINGLE_FILE, **hub_options))
        except EntryNotFoundError:
            return Path(hf_hub_download(str(source), PUBLISHED_FILES[input_size], **hub_options))
    except (EntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"{source}: no such file or folder, nor to be had from the hub: {reason}"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory.

    Raises:
        ValueError: not a whole safetensors file.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def read_metadata(path: Path) -> dict[str, Any]:
    """What ``save_weights`` noted: network, config and more; nothing in a file of others.

    Raises:
        ValueError, OSError: as ``read_weights``.
    """
    with _opened(path) as file:
        text = (file.metadata() or {}).get(METADATA, "{}")
    try:
        noted = json.loads(text)
    except (ValueError, RecursionError):
        noted = None
    if not isinstance(noted, dict):
        raise ValueError(
            f"{path}: metadata {METADATA!r}: expected a JSON object, got {text[:40]!r}"
        )
    for key, (kind, what) in NOTES.items():
        if key in noted and not isinstance(noted[key], kind):
            raise ValueError(
                f"{path}: metadata {METADATA!r}: {key}: expected {what}, got {noted[key]!r:.40}"
            )
    if "config" in noted and "network" not in noted:
        raise ValueError(f"{path}: metadata {METADATA!r}: expected network beside config, got none")
    return noted


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def require_finite(model: nn.Module, source: str) -> None:
    """Raise ValueError, naming them, if there are parameters with infinite or NaN entries."""
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source}: not finite: {_some(broken)}")


def published_config(path: Path, shapes: Shapes) -> dict[str, Any]:
    """The arguments of ``LatentDiffiT`` that a published file was made with.

    Raises:
        ValueError: keys that every such file has are missing, or have other dimensions.
    """
    needed = {  # by their dimensions
        "x_embedder.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "pos_embed": 3,
        "blocks.0.attn.relative_position_bias_table": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(
            f"{path}: neither a configuration in its metadata nor the published layout: missing "
            f"{_some(missing)}; it holds {_some(sorted(shapes))}"
        )
    for name, dimensions in needed.items():
        if len(shapes[name]) != dimensions:
            raise ValueError(
                f"{path}: {name}: expected {dimensions} dimensions, got shape {shapes[name]}"
            )
    patches, labels, positions, table, fc1, final = (shapes[name] for name in needed)
    hidden_size, in_channels, patch_size, _ = patches
    blocks = {match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "input_size": round(positions[1] ** 0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len(blocks),
        "num_heads": table[1],
        "mlp_ratio": fc1[0] / hidden_size,
        "num_classes": labels[0] - 1,
        "learn_sigma": final[0] == 2 * in_channels * patch_size**2,
    }


def _require_keys(path: Path, expected: Shapes, found: Shapes) -> None:
    # The published files keep this constant, which TMSA takes and drops.
    found = {k: v for k, v in found.items() if not k.endswith(".relative_position_index")}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_some(missing)}")
    if foreign := sorted(found.keys() - expected.keys()):
        problems.append(f"unknown {_some(foreign)}")
    if other := [k for k in expected.keys() & found.keys() if expected[k] != found[k]]:
        first = min(other)
        problems.append(f"{first}: expected {expected[first]}, got {found[first]}")
    if problems:
        raise ValueError(f"{path}: does not fit the network: {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more
