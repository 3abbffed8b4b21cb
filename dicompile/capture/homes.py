"""Where the global names lie that the functions of a model's classes read.

That is a Python module, as a rule. A class that was made by ``exec``, in a doctest, out of a pickle of its code, or in
the script of a process that was spawned, has a namespace of its own: a module of that name has other names, or there is
none. Such names are found by way of the class.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from torch import nn

from dicompile.capture.guards import By, Path
from dicompile.errors import CannotCapture


class Homes:
    """Namespaces of the classes of a module and of its parts.

    Args:
        module: the module.

    Attributes:
        foreign: paths of those that are no Python module's, by what they call their module.

    Raises:
        CannotCapture: two of these go by one name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.foreign: dict[str, Path] = {}
        self._paths: dict[int, Path] = {}
        self._alive: list[dict[str, Any]] = []  # ids are those of living objects
        seen: set[type] = set()
        for name, part in module.named_modules():
            if type(part) not in seen:
                seen.add(type(part))
                path = Path()
                for step in name.split(".") if name else ():
                    path = path.attribute(step)
                self._add(type(part), path.via(By.TYPE).attribute("__mro__"))

    def find(self, names: dict[str, Any]) -> Path | None:
        """The path of a namespace, if it is one of them."""
        return self._paths.get(id(names))

    def path_of(self, number: int) -> Path:
        """The path of a namespace by its id.

        Raises:
            CannotCapture: no class of the module is of it.
        """
        if number not in self._paths:
            raise CannotCapture(
                "a function that the forward calls is of no module",
                where="capture",
                why="its names lie in a namespace that nothing in the model leads to",
                fix="define it in a Python module that is imported",
            )
        return self._paths[number]

    def _add(self, kind: type, mro: Path) -> None:
        for i, cls in enumerate(kind.__mro__):
            for key, value in vars(cls).items():
                names = value.__globals__ if isinstance(value, types.FunctionType) else {}
                called = names.get("__name__")
                if called is None or id(names) in self._paths:
                    continue
                self._alive.append(names)
                if called in sys.modules and vars(sys.modules[called]) is names:
                    self._paths[id(names)] = Path(called)
                    continue
                if called in self.foreign:
                    raise CannotCapture(
                        f"{kind.__name__} reads names of two namespaces that are called {called}",
                        where="capture",
                        why="which of them a name is of cannot be told",
                        fix="define its classes in Python modules, or in one namespace",
                    )
                self._paths[id(names)] = mro.item(i).attribute(key).attribute("__globals__")
                self.foreign[called] = self._paths[id(names)]
