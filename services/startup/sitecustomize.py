"""Run by Python at the start of every process of a windfarm, because this folder is on its path: Ray Serve starts
without pandas.

Serve loads pandas where it is installed, only to write data frames as JSON, which no part of windfarm does; Gradio
needs it installed. A start of windfarm makes a dozen Python processes, each of which would take a quarter of a second
for it. Whoever else asks for pandas gets it.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_ASKING = "ray.serve._private.utils"


class _NoPandasForServe:
    """A finder that finds nothing, and forbids one module one import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "pandas" and _importing_module() == _ASKING:
            raise ModuleNotFoundError("Ray Serve does without pandas here.", name=name)
        return None


def _importing_module() -> str:
    """Name of the module with the import statement: the first frame outside Python's own import machinery."""
    frame = sys._getframe(2)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("importlib"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


sys.meta_path.insert(0, _NoPandasForServe())
