"""Triton's interpreter looks through its whole language at every call of a function, nested ones too, for what it has
to replace: a third of its time. What there is does not change. To be imported by whoever runs interpreted kernels."""

import functools
import inspect
import os
from typing import Any

if os.environ["TRITON_INTERPRET"] == "1":
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def _builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in _builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = _patch_builtin
