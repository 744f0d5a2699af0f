"""What to average, as it is typed: schemes, their rows of coefficients, the names of outputs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ckptavg.coefficients import CoefficientRow
from ckptavg.errors import UsageError
from ckptavg.schemes.kinds import DEFAULT_SAMPLES, SchemeKind, kind_named, list_schemes, meant
from ckptavg.schemes.options import Option, read_number, read_range
from ckptavg.schemes.windows import Positions, window_of

_LABEL = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)  # a directory that needs no quoting
_UNTAME = re.compile(r"[^\w.+-]+", re.ASCII)
_MAX_SCHEMES = 1000
_SHOWN_CHARACTERS = 60  # of a scheme in messages


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Scheme:
    """Which checkpoints go into one average, and how much each of them counts.

    ``list_schemes()`` lists the schemes with their options; an option that does not belong to the
    scheme is refused. ``str(scheme)`` is what one types, without the label.

    Attributes:
        name: ``uniform``, ``linear``, ``ema``, ``power``, ``wsm``, ``coefficients``, ``phema``,
            ``unaverage``, ``median``, ``trimmed`` or ``swag``.
        last: Of the window: the last so many checkpoints only.
        first: The first so many only.
        from_step: Those from this training step on; ``from=`` as typed.
        to_step: Those up to this training step; ``to=`` as typed.
        every: Every so-manyth, counted back from the newest.
        decay: For ``ema`` and ``unaverage``: how much of the average each update keeps; for
            ``wsm`` the form of the decay, such as ``cosine``.
        step_decay: For the same: how much of the average each training step keeps.
        sigma: For ``power`` and ``phema``: relative standard deviation of the profile, in units of
            the training time.
        final: For ``wsm``: the learning rate at the end of the decay, as a share of the peak.
        coefficients: For ``coefficients``: one multiplier a checkpoint, in the order of the
            sources. They must sum to 1 within 1e-6 and are divided by their sum.
        stored: For ``phema``: sigma of all stored averages, or of each in the order of the
            sources; None reads it from their names.
        counts: For ``unaverage``: of how many iterates the older and the newer average are.
        updates: For ``unaverage``: how many updates lie between the averages.
        fraction: For ``trimmed``: the share that is cut off at each end.
        rank: For ``swag``: how many deviations there are; None is 20, or all of fewer.
        samples: For ``swag``: how many models to make; None is 10.
        seed: For ``swag``: of the random numbers; None is 0.
        scale: For ``swag``: what the noise is multiplied with; None is 1.
        label: What the output's directory is called among several; None derives it.

    Raises:
        UsageError: If the options do not belong to the scheme or make no sense.
    """

    name: str = "uniform"
    last: int | None = None
    first: int | None = None
    from_step: int | None = None
    to_step: int | None = None
    every: int | None = None
    decay: float | str | None = None
    step_decay: float | None = None
    sigma: float | None = None
    final: float | None = None
    coefficients: tuple[float, ...] | None = None
    stored: tuple[float, ...] | None = None
    counts: tuple[int, int] | None = None
    updates: int | None = None
    fraction: float | None = None
    rank: int | None = None
    samples: int | None = None
    seed: int | None = None
    scale: float | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        kind = kind_named(self.name)
        options = {option.field: option for option in kind.all_options}
        for field, value in _given(self).items():
            option = options.get(field)
            if option is None:
                raise UsageError(f"scheme '{self.name}': {_no_option(field, kind)}")
            try:
                object.__setattr__(self, field, option.values.check(value))
            except (ValueError, TypeError) as error:
                raise _bad_value(self.name, option, _typed(option, value)) from error
        given = _given(self)
        for option in kind.options:
            if option.required and option.field not in given:
                raise UsageError(
                    f"scheme '{self.name}': needs {option.key}, for example {kind.example}"
                )
        try:
            kind.check(given)
            if "last" in given and "first" in given:
                raise ValueError("takes last or first, not both")
            if given.get("from_step", 0) > given.get("to_step", given.get("from_step", 0)):
                raise ValueError("the step of from= is after that of to=")
        except ValueError as error:
            raise UsageError(f"scheme '{self.name}': {error}") from error
        if self.label is not None and not _LABEL.fullmatch(self.label):
            raise UsageError(
                f"'{self.label}' cannot name an output: use letters, digits, '_', '-', '.' and '+'"
            )

    def __str__(self) -> str:
        """Return the scheme as it is typed, without its label."""
        return self._text(kind_named(self.name).all_options)

    def __repr__(self) -> str:
        """Return the call that makes it."""
        given = {"name": self.name, **_given(self)}
        if self.label is not None:
            given["label"] = self.label
        return f"Scheme({', '.join(f'{key}={value!r}' for key, value in given.items())})"

    @property
    def directory_name(self) -> str:
        """The name that its output has among others, if it has no label of its own."""
        options = kind_named(self.name).all_options
        text = self._text([option for option in options if not option.per_source])
        return _UNTAME.sub("-", text.replace("=", ""))[:100]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of its outputs end with, one each; a single output has no suffix."""
        if self.name != "swag":
            return ("",)
        n = self.samples or DEFAULT_SAMPLES
        return tuple(f"sample-{number:0{max(len(str(n)), 2)}}" for number in range(1, n + 1))

    def reordered(self, order: Sequence[int]) -> "Scheme":
        """Return the scheme for checkpoints in another order: new[i] was old[order[i]].

        Raises:
            UsageError: If what is given one a checkpoint does not go with them.
        """
        self.check_count(len(order))
        changed: dict[str, Any] = {
            name: tuple(values[index] for index in order)
            for name, values in self._per_source().items()
        }
        return replace(self, **changed) if changed else self

    def check_count(self, n_checkpoints: int) -> None:
        """Refuse what is given one a checkpoint if there are more checkpoints, or fewer.

        Raises:
            UsageError: If so.
        """
        for name, values in self._per_source().items():
            if len(values) != n_checkpoints:
                what = "coefficients" if name == "coefficients" else f"values of {name}"
                raise UsageError(f"{len(values)} {what} for {n_checkpoints} checkpoints")

    def _per_source(self) -> dict[str, tuple[float, ...]]:
        given = _given(self)
        return {
            option.field: given[option.field]
            for option in kind_named(self.name).options
            if option.per_source
            and option.field in given
            and (option.required or len(given[option.field]) > 1)  # one may stand for all
        }

    def _text(self, options: Sequence[Option]) -> str:
        kind, given = kind_named(self.name), _given(self)
        told = [
            option.values.write(given[option.field])
            if kind.positional
            else f"{option.key}={option.values.write(given[option.field])}"
            for option in options
            if option.field in given
        ]
        return f"{self.name}:{','.join(told)}" if told else self.name


def parse_scheme(text: str) -> Scheme:
    """Read one scheme: ``[LABEL=]NAME[:KEY=VALUE,...]``.

    ``uniform``, ``uniform:last=5``, ``ema:decay=0.9,every=2``, ``coefficients:0.2,0.8``,
    ``late=uniform:last=5``. Numbers may be fractions such as ``1/3``.

    Raises:
        UsageError: If it is not of that form, or a range makes several of it.
    """
    found = parse_schemes(text)
    if len(found) > 1:
        raise UsageError(f"scheme '{text}': stands for {len(found)} schemes, expected one")
    return found[0]


def parse_schemes(text: str) -> tuple[Scheme, ...]:
    """Read one scheme, or several that differ in a whole number: ``uniform:last=1..8``.

    A range ``A..B`` or ``A..B..STEP`` includes its end; one option may have one. Labels of several
    end with the number: ``k=uniform:last=1..3`` makes ``k-1``, ``k-2`` and ``k-3``.

    Raises:
        UsageError: If it is not of that form.
    """
    head, colon, tail = text.partition(":")
    label, equals, name = head.rpartition("=")
    if equals and not label:
        raise UsageError(f"scheme '{text}': nothing stands before '='")
    if (misplaced := label.partition("=")[0]) in [kind.name for kind in list_schemes()]:
        raise UsageError(
            f"scheme '{text}': options stand after ':', as in {text.replace('=', ':', 1)}"
            if not colon
            else f"scheme '{text}': '{misplaced}' is a scheme and cannot be a label"
        )
    kind = kind_named(name)
    chosen, numbers = dict[str, Any](), dict[str, tuple[int, ...]]()
    if kind.positional:
        chosen = {kind.options[0].field: parse_coefficients(tail)}
    elif colon:
        for part in tail.split(","):
            option, value = _read_option(text, kind, part)
            if option.field in chosen or option.field in numbers:
                raise UsageError(f"scheme '{text}': {option.key} is given twice")
            (numbers if isinstance(value, _Range) else chosen)[option.field] = value
    if len(numbers) > 1:
        raise UsageError(f"scheme '{text}': only one option may have a range")
    if not numbers:
        return (Scheme(name=name, label=label or None, **chosen),)
    ((field, values),) = numbers.items()
    return tuple(
        Scheme(name=name, label=f"{label}-{value}" if label else None, **chosen | {field: value})
        for value in values
    )


class _Range(tuple[int, ...]):
    """The values of an option that was typed as a range."""

    __slots__ = ()


def _read_option(text: str, kind: SchemeKind, part: str) -> tuple[Option, Any]:
    key, equals, value = part.partition("=")
    option = next((one for one in kind.all_options if one.key == key), None)
    if option is None:
        raise UsageError(f"scheme '{text}': {_no_option(key, kind)}")
    if not equals:
        raise _bad_value(text, option, "")
    try:
        numbers = read_range(value) if option.takes_range else None
        if numbers is None:
            return option, option.values.read(value)
        if len(numbers) > _MAX_SCHEMES:
            raise UsageError(f"scheme '{text}': {key} stands for {len(numbers)} schemes")
        return option, _Range(numbers)
    except ValueError as error:
        raise _bad_value(text, option, value) from error


def _given(scheme: Scheme) -> dict[str, Any]:
    """Return the options that were given, by field."""
    values = {one.name: getattr(scheme, one.name) for one in fields(scheme)}
    return {
        name: value
        for name, value in values.items()
        if name not in ("name", "label") and value is not None
    }


def _typed(option: Option, value: Any) -> str:
    try:
        return option.values.write(value)
    except TypeError:
        return repr(value)


def _bad_value(scheme: str, option: Option, value: str) -> UsageError:
    return UsageError(
        f"scheme '{scheme}': {option.key} is '{value}', expected {option.values.expected}"
    )


def _no_option(key: str, kind: SchemeKind) -> str:
    if not kind.all_options or kind.positional:
        return f"'{key}' is not an option of {kind.name}, which takes numbers alone"
    near = meant(key, [option.key for option in kind.all_options])
    return f"'{key}' is not an option of {kind.name}; {near}"


def parse_coefficients(text: str) -> tuple[float, ...]:
    """Read comma-separated numbers or fractions: ``0.2,0.3,0.5`` or ``1/3,1/3,1/3``.

    Raises:
        UsageError: If it is not a list of them.
    """
    try:
        return tuple(map(read_number, text.split(",")))
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of numbers such as 0.2,0.3,0.5") from error


def coefficient_rows(
    scheme: Scheme, positions: Positions, notes: list[str] | None = None
) -> list[tuple[str, CoefficientRow]]:
    """Return what a scheme makes of checkpoints: the name's suffix and the row of each output.

    Args:
        scheme: What is wanted.
        positions: The checkpoints, oldest first.
        notes: What the user should know about the coefficients is added here.

    Raises:
        UsageError: If the scheme asks for more checkpoints than there are, explicit coefficients do
            not match them or do not sum to 1, or training steps are needed and are not known, or
            do not increase.
    """
    kind, n_checkpoints = kind_named(scheme.name), len(positions.labels)
    scheme.check_count(n_checkpoints)
    given, told = _given(scheme), list[str]() if notes is None else notes
    window = window_of(
        shortened(str(scheme)), given, positions, told, by_step=not kind.one_step_each
    )
    return list(zip(scheme.suffixes, kind.rows(given, window), strict=True))


def shortened(scheme: str) -> str:
    """Return a scheme as typed, without the middle of a long list of numbers."""
    if len(scheme) <= _SHOWN_CHARACTERS:
        return scheme
    return f"{scheme[: _SHOWN_CHARACTERS // 2]}...{scheme[-_SHOWN_CHARACTERS // 4 :]}"


def output_names(schemes: Sequence[Scheme]) -> tuple[str, ...]:
    """Name the directories of all outputs: by label, else by scheme; one output needs none.

    ``uniform:last=5`` becomes ``uniform-last5``; a second ``coefficients`` ``coefficients-2``; the
    samples of ``swag`` ``swag-sample-01`` and so on, or ``sample-01`` where it is the only scheme.

    Raises:
        UsageError: If two schemes have the same label, or are the same without having labels.
    """
    if len(schemes) == 1:
        return schemes[0].suffixes if len(schemes[0].suffixes) > 1 else ("",)
    names: list[str] = []
    for scheme in schemes:
        name = scheme.label or scheme.directory_name
        taken = {other.lower() for other in names}
        if name in names and scheme.label is None and scheme._per_source():
            numbered = (f"{name}-{count}" for count in range(2, len(schemes) + 1))
            name = next(candidate for candidate in numbered if candidate not in names)
        made = [f"{name}-{suffix}" if suffix else name for suffix in scheme.suffixes]
        if taken.intersection(one.lower() for one in made):
            raise UsageError(
                f"two outputs would be called '{made[0]}'; name them, for example "
                f"--scheme other={scheme}"
            )
        names += made
    return tuple(names)
