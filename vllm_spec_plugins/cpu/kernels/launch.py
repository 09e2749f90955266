# SPDX-License-Identifier: Apache-2.0
"""How a launch `kernel[grid](*arguments)` reaches its replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NeedsGrid:
    """A replacement that gets the launch grid as its first argument."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    def on(self, grid: Any) -> Callable[..., None]:
        function = self.function

        def launch(*args: Any, **kwargs: Any) -> None:
            function(grid, *args, **kwargs)

        return launch

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{self.__name__} needs the grid of its launch: {self.__name__}.on(grid)(...)")


def needs_grid(function: Callable[..., None]) -> NeedsGrid:
    return NeedsGrid(function)
