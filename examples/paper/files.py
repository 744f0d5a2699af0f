"""Numbers and pictures as files, side by side."""

import csv
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write what a program may want to read."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table for a spreadsheet."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Write pictures into a folder."""
    for name, content in pictures.items():
        (folder / name).write_bytes(content)


def has_matplotlib() -> bool:
    """Return whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def print_facts(facts: Mapping[str, bool]) -> None:
    """Print what holds and what does not."""
    print()
    for fact, holds in facts.items():
        print(f"{'yes' if holds else 'NO '} {fact}")
