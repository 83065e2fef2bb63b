"""A range of numbers for options. Imports nothing but click, so that `--help` is quick."""

import math
from typing import Any

import click


class NumberRange(click.FloatRange):
    """A `FloatRange` that refuses nan too, which is neither below one end nor above the other."""

    def __init__(self, min: float | None, max: float | None, *, min_open: bool = False) -> None:
        super().__init__(min=min, max=max, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number
