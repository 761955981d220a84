"""Files that are written whole or not at all: every file that the library writes goes through here.

The content goes into a temporary file beside the target, onto the disk, and takes the target's name at last. A process that is
killed, or a disk that is full, leaves the file of before; a kill also leaves the temporary file, `.NAME.XXXX.part`.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PART", "untied", "write_file", "write_saved", "write_tensors", "written_files"]

#: End of the names of temporary files, which are hidden.
PART = ".part"
#: Letters of a target's name in that of its temporary file: together they must not pass the 255 bytes of a name.
NAMED = 40


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all.

    Its permissions are those that `open(path, "wb")` gives: of the file that is there, else by the process's mask. A link is
    followed; what is no regular file, such as `/dev/null` or a pipe, is written to as it is.

    Args:
        path: The file.
        write: Writes the content to a binary file that is open.

    Raises:
        OSError: It cannot be written: the disk is full, the folder is gone or read-only.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as file:  # a folder is refused by it
            write(file)
        return
    part = _part_of(target)
    try:
        with _told_of(Path(path)), _new_file(part) as file:
            write(file)
            file.flush()
            _settle(file.fileno(), target)
        part.replace(target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def written_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path of that name, for a writer of several files; at a normal end they move to where they belong.

    Raises:
        OSError: The folder is gone or read-only.
    """
    path = Path(path)
    name = f".{path.name[:NAMED]}."
    with _told_of(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=name, suffix=PART) as folder:
        place = Path(folder) / path.name
        yield place
        found = sorted(Path(folder).iterdir(), key=lambda file: file == place)  # the file itself comes last
        for file in found:
            with file.open("rb+") as opened:
                _settle(opened.fileno(), path.parent / file.name)
        for file in found:
            file.replace(os.path.realpath(path.parent / file.name))


def write_saved(path: str | os.PathLike[str], content: Any) -> None:
    """Write what `torch.save` writes, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    import torch

    write_file(path, lambda file: torch.save(content, file))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of safetensors, whole or not at all; equal content is equal bytes.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors.torch import save

    content = memoryview(save(dict(tensors), dict(metadata)))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:end]))
    header["__metadata__"] = dict(sorted(metadata.items()))  # safetensors gives them in an order by chance
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(content[end:])

    write_file(path, write)


def untied(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a model's tensors as a file of safetensors holds them: tied ones once, under their first name.

    Args:
        state: Its `state_dict()`; not changed.

    Returns:
        Name -> contiguous memory that no other of the tensors shares; a copy where one is a part of another.

    Raises:
        ValueError: Something is no tensor, which such a file does not hold.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    seen: set[Any] = set()
    used: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"model must have tensors alone in its state, got {name} ({type(tensor).__name__})")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = _alone(tensor.detach(), used)
    return tensors


def _alone(tensor: Tensor, used: set[int]) -> Tensor:
    """Return the tensor as contiguous memory; a copy if its memory is in use already, else that is noted."""
    storage = tensor.untyped_storage()
    part = storage.nbytes() != tensor.numel() * tensor.element_size()
    if part or storage.data_ptr() in used:
        return tensor.clone().contiguous()
    used.add(storage.data_ptr())
    return tensor.contiguous()


def _part_of(target: Path) -> Path:
    name = target.name.encode(errors="surrogateescape")[:NAMED].decode(errors="ignore")
    return target.with_name(f".{name}.{secrets.token_hex(4)}{PART}")


def _new_file(part: Path) -> BinaryIO:
    # Not by `tempfile`, whose files are for their owner alone, whatever the process's mask says.
    return os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb")


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Tell of what cannot be written by an `OSError` with the file's name; torch may tell by a RuntimeError about positions."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise type(cause)(cause.errno, cause.strerror, str(path)) from error


def _settle(descriptor: int, target: Path) -> None:
    """Give a file the permissions and the owner of the one that it takes the place of, and put it onto the disk."""
    with suppress(OSError, AttributeError):  # there is none, or it is another's; Windows has no owners
        before = target.stat()
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fsync(descriptor)
