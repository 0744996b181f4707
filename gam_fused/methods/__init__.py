"""The methods, one file each: its passes as the paper's pseudo-code, its direction's coefficients, defaults and diagnostics.

A file of this folder that defines `METHOD` is all that a method is.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from gam_fused.settings import Takes
from gam_fused.step.method import Method

_MODULES = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES if hasattr(module, "METHOD")}
TAKES: dict[str, Takes] = {name: method.takes for name, method in METHODS.items()}
