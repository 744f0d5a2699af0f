"""Logs of a training: rows of what was recorded at a step or an epoch, in CSV, JSONL or JSON.

What trainers write is understood by the names of its columns: transformers' ``trainer_state.json``,
Lightning's ``metrics.csv``, timm's ``summary.csv``, and files of one's own.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ckptavg.cycles import Recorded
from ckptavg.errors import SourceError

_MAX_LOG_BYTES = 64 * 2**20
_MAX_ROWS = 1_000_000
_STEP_NAMES = (
    "step", "global_step", "trainer/global_step", "train/global_step", "iteration", "iter",
    "num_updates",
)  # fmt: skip
_EPOCH_NAMES = ("epoch",)
_RATE_NAMES = ("learning_rate", "lr", "train/learning_rate", "train/lr")
# of Lightning's LearningRateMonitor; it logs momentum and weight decay under names like these
_LIGHTNING_RATE = re.compile(r"lr-(?!.*(momentum|weight_decay)).+")
_SUMMARY_OF_TIMM = frozenset({"epoch", "train_loss", "lr"})
_DELIMITERS = (",", "\t", ";")


class Row(NamedTuple):
    """What was recorded together.

    Attributes:
        step: Training step, where the row tells one.
        epoch: Epoch, where it tells a whole one.
        rate: The learning rate, where it tells one.
        values: The other numbers, by name; NaN where that is on record.
    """

    step: int | None
    epoch: int | None
    rate: float | None
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """A log that was read.

    Attributes:
        label: What messages call it.
        rows: In the order of the file.
        recorded: Whether its rates are those of the update (or epoch) of a row or of the one after,
            where its form tells.
    """

    label: str
    rows: Sequence[Row]
    recorded: Recorded | None = None

    @property
    def has_rates(self) -> bool:
        """Whether any row tells a learning rate."""
        return any(row.rate is not None for row in self.rows)


def read_log(path: str | Path) -> TrainingLog:
    """Read a log: CSV with a header, a JSON object a line, a list of those, trainer_state.json.

    Raises:
        SourceError: If it cannot be read, is too large, has neither steps nor epochs, or a row is
            not as the others; the message names the line.
    """
    label = str(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_LOG_BYTES + 1)
    except (OSError, ValueError) as error:  # a name with a NUL byte
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"{label}: the log cannot be read: {reason}") from error
    if len(raw) > _MAX_LOG_BYTES:
        raise SourceError(
            f"{label}: the log has more than {_MAX_LOG_BYTES} bytes; keep the columns and rows "
            "that are needed"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{label}: the log is not text (UTF-8)") from error
    start = text.lstrip()[:1]
    rows = _json_rows(text, label) if start in ("{", "[") else _csv_rows(text, label)
    return log_of_rows(rows, label)


def log_of_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], label: str) -> TrainingLog:
    """Make a log of rows as they were read.

    Args:
        rows: Where each stands, as messages say it, and its values by name.
        label: What messages call the log.

    Raises:
        SourceError: If a row has neither step nor epoch, or no number where one belongs.
    """
    found: list[Row] = []
    is_lightning = is_timm = False
    for where, values in rows:
        if len(found) == _MAX_ROWS:
            raise SourceError(f"{label}: the log has more than {_MAX_ROWS} rows; keep every tenth")
        step = _whole(values, _STEP_NAMES, where)
        epoch = _whole(values, _EPOCH_NAMES, where, may_be_part=True)
        rate_name = _rate_name(values)
        rate = None if rate_name is None else _rate(values[rate_name], rate_name, where)
        if step is None and epoch is None:
            raise SourceError(
                f"{where}: tells neither a step nor an epoch (a column step, global_step, "
                "iteration or epoch)"
            )
        is_lightning |= rate_name is not None and rate_name not in _RATE_NAMES
        is_timm |= step is None and values.keys() >= _SUMMARY_OF_TIMM
        apart = {*_STEP_NAMES, *_EPOCH_NAMES, rate_name}
        numbers = {name: _number(value) for name, value in values.items() if name not in apart}
        known = {name: value for name, value in numbers.items() if value is not None}
        found.append(Row(step, epoch, rate, known))
    if not found:
        raise SourceError(f"{label}: the log has no rows")
    # Lightning's rows count steps from 0 and are logged as a batch begins; timm's as an epoch ends
    return TrainingLog(
        label=label, rows=found, recorded="next" if is_lightning else "used" if is_timm else None
    )


def _csv_rows(text: str, label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    header = text.lstrip().partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            where = f"{label}: line {reader.line_num}"
            if names is None:
                names = [cell.strip() for cell in cells]
                twice = [name for name in names if names.count(name) > 1]
                if twice:
                    raise SourceError(f"{where}: names the column '{twice[0]}' twice")
            elif any(cells):
                if len(cells) != len(names):
                    raise SourceError(
                        f"{where}: has {len(cells)} cells, the header names {len(names)}"
                    )
                yield (
                    where,
                    {
                        name: cell.strip()
                        for name, cell in zip(names, cells, strict=True)
                        if cell.strip()
                    },
                )
    except csv.Error as error:
        raise SourceError(f"{label}: line {reader.line_num}: is not CSV: {error}") from error


def _json_rows(text: str, label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict):
        whole = whole.get("log_history", [whole])
        if not isinstance(whole, list):
            raise SourceError(f"{label}: its log_history is not a list of rows")
    if isinstance(whole, list):
        yield from json_rows(whole, label)
        return
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{label}: line {number}"
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{where}: is not JSON") from error
            yield where, _json_row(value, where)


def json_rows(rows: Iterable[Any], label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield rows as ``log_of_rows`` takes them, from a list that was JSON."""
    for number, row in enumerate(rows, 1):
        where = f"{label}: row {number}"
        yield where, _json_row(row, where)


def _json_row(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{where}: is not an object with names and values")
    return {name: value for name, value in row.items() if value is not None}


def _rate_name(values: Mapping[str, Any]) -> str | None:
    for name in _RATE_NAMES:
        if name in values:
            return name
    return next((name for name in values if _LIGHTNING_RATE.fullmatch(name)), None)


def _whole(
    values: Mapping[str, Any], names: Sequence[str], where: str, *, may_be_part: bool = False
) -> int | None:
    """Return the first of some values, which count something; None where there is none."""
    name = next((name for name in names if name in values), None)
    if name is None:
        return None
    number = _number(values[name])
    if number is not None and math.isnan(number):
        return None  # an empty cell, as some write it
    is_count = number is not None and math.isfinite(number) and 0 <= number < 2**53
    if number is None or not is_count or (number != int(number) and not may_be_part):
        raise SourceError(f"{where}: its {name} is '{_shown(values[name])}', expected a number")
    return int(number) if number == int(number) else None


def _rate(value: Any, name: str, where: str) -> float | None:
    number = _number(value)
    if number is not None and math.isnan(number):
        return None
    if number is None or not math.isfinite(number) or number < 0:
        raise SourceError(f"{where}: its {name} is '{_shown(value)}', expected a learning rate")
    return number


def _number(value: Any) -> float | None:
    if type(value) not in (int, float, str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):  # text, or an integer of many digits
        return None


def _shown(value: Any) -> str:
    return str(value)[:40]
