"""Selectors in files: as JSON of their own, or in the header of a small model's file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasterai.core.files import write_file

__all__ = ["SELECTORS", "read_entry", "read_selectors", "write_selectors"]

#: Key of the selectors in the header of a small model's file, and the format of a file of their own.
SELECTORS, FORMAT = "selectors", "fasterai-selector-1"
FIELDS = {"keep": list, "size": int, "dim": int, "names": list | None}


def write_selectors(path: str | os.PathLike[str], selectors: Mapping[str, Any]) -> None:
    """Write selectors, as plain data, by the names of their arguments."""
    text = json.dumps({"format": FORMAT, SELECTORS: dict(selectors)})
    write_file(path, lambda file: file.write(text.encode()))


def read_selectors(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Read selectors from a file of their own, or from a small model's file.

    Raises:
        ValueError: It is neither, or has none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        entry = found.get(SELECTORS) if isinstance(found, dict) and found.get("format") == FORMAT else None
        return read_entry(path, entry)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return read_entry(path, _header(path).get(SELECTORS))


def _header(path: str | os.PathLike[str]) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        if SELECTORS in metadata:
            return {SELECTORS: json.loads(metadata[SELECTORS])}
        cuts = json.loads(metadata.get("inputs", "[]"))  # of a removal whose selectors were not kept
        return {SELECTORS: {c["argument"]: {**{n: c[n] for n in ("keep", "size", "dim")}, "names": None} for c in cuts}}
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"path must be a file with a selector, got {path}: {error}") from error


def read_entry(path: str | os.PathLike[str], entry: Any) -> dict[str, dict[str, Any]]:
    """Return selectors as they were saved, or refuse what is none.

    Raises:
        ValueError: It is none.
    """
    is_one = isinstance(entry, dict) and entry and all(_is_selector(one) for one in entry.values())
    if not is_one:
        repair = "; save_small(path, model, selector=...) keeps one with the model"
        raise ValueError(f"path must be a file with a selector, got {path}, which has none{repair}")
    return dict(entry)


def _is_selector(one: Any) -> bool:
    return (
        isinstance(one, dict) and set(one) == set(FIELDS) and all(isinstance(one[name], kind) for name, kind in FIELDS.items())
    )
