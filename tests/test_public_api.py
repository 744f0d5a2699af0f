"""The front door: complete, sorted, lazy."""

import subprocess
import sys
from importlib import import_module

import ckptavg


def test_all_is_sorted_and_everything_in_it_is_there() -> None:
    public = [name for name in ckptavg.__all__ if name != "__version__"]
    assert public == sorted(public)
    assert set(public) == set(ckptavg._HOME)
    for name in public:
        assert getattr(ckptavg, name) is getattr(
            import_module(f"ckptavg.{ckptavg._HOME[name]}"), name
        )
        assert getattr(ckptavg, name).__doc__


def test_every_error_is_public() -> None:
    from ckptavg.errors import CkptavgError

    for error in CkptavgError.__subclasses__():
        assert error.__name__ in ckptavg.__all__


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(ckptavg, "average_everything")


def test_import_does_not_import_torch_or_numpy() -> None:
    code = "import sys, ckptavg; print({'torch', 'numpy', 'click'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
