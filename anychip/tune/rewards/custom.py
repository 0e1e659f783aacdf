"""A reward of the user's own."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

from anychip.errors import InputError
from anychip.tune.rewards.reward import Answered, Score


def custom(name: str) -> Score:
    """The function `module:function`, looked for in the working directory too. It is given an Answered and returns a
    finite number. Raises InputError when there is none such."""
    module_name, _, function_name = name.partition(":")
    function = _function(module_name, function_name, name)

    def score(answered: Answered) -> float:
        value = function(answered)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        raise InputError(f"returned {value!r}, not a finite number.", where=f"the reward {name}")

    return score


def _function(module_name: str, function_name: str, name: str) -> Callable[[Answered], object]:
    where, do = f"the reward {name}", "Write module:function, for a module that Python finds from here."
    if not module_name or not function_name:
        raise InputError("is not `module:function`.", where=where, do=do)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot be imported ({error}).", where=where, do=do) from None
    if not callable(function):
        raise InputError("is not a function.", where=where, do=do)
    found: Callable[[Answered], object] = function
    return found
