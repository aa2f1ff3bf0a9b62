"""Adapter files: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory; strict, never half written, versioned.

Tensors are keyed by site id (``encoder.0.self_attention/down_sampler.weight``) and, for
tensors of the base that the method trains, ``base/<id>``; never by module path, which moves from one version of transformers to
the next. The config holds the sha256 of the tensor file, so a truncated, changed or mixed-up pair is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FORMAT, VERSION = "fastadapt", 1


class AdapterFileError(ValueError):
    """An adapter file is missing, corrupted, foreign, or does not fit the model."""


def write(directory: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files; each appears under its name only when it is complete, and what was there before stays until then.

    Raises:
        OSError: the directory cannot be written.
    """
    from safetensors.torch import save

    data = save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, metadata={"format": "pt"})
    text = json.dumps({"format": FORMAT, "format_version": VERSION, **config, "tensors_sha256": hashlib.sha256(data).hexdigest()}, indent=2)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    put({folder / TENSORS: data, folder / CONFIG: text.encode() + b"\n"})


def put(files: Mapping[Path, bytes]) -> None:
    """Writes files; each appears under its name only when all are complete, and what was there before stays until then. They do not appear at one instant: who reads between the
    renames, or after a crash there, finds a pair that `read` refuses.

    Raises:
        OSError: one cannot be written.
    """
    with contextlib.ExitStack() as stack:
        complete = [(stack.enter_context(_beside(path, data)), path) for path, data in files.items()]
        for file, path in complete:
            os.replace(file, path)


@contextlib.contextmanager
def _beside(path: Path, data: bytes) -> Iterator[Path]:
    """A complete, synced temporary file next to ``path``, which is removed if it is still there at the end."""
    name = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with open(name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            name.unlink()


def read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors (on the CPU) of an adapter directory.

    Raises:
        AdapterFileError: a file is missing, corrupted, of another program or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(directory)
    try:
        text, data = (folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()
    except OSError as error:
        raise AdapterFileError(f"{folder}: must hold {CONFIG} and {TENSORS}: {error}") from None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise AdapterFileError(f"{folder / CONFIG}: is not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        other = f" It is one of PEFT (peft_type {config['peft_type']!r})." if isinstance(config, dict) and "peft_type" in config else ""
        raise AdapterFileError(f"{folder / CONFIG}: is no adapter of fastadapt (no 'format': '{FORMAT}').{other}")
    version = config.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise AdapterFileError(f"{folder / CONFIG}: format_version {version!r} is unknown; this fastadapt reads 1 to {VERSION}")
    if config.get("tensors_sha256") != hashlib.sha256(data).hexdigest():
        raise AdapterFileError(f"{folder / TENSORS}: is truncated, changed, or not the file that {CONFIG} was written with (sha256 differs)")
    try:
        return config, load(data)
    except SafetensorError as error:
        raise AdapterFileError(f"{folder / TENSORS}: is no safetensors file ({error})") from None
