"""Run-time checking of the package's signatures, by jaxtyping and beartype.

``install`` makes every annotated function of provenn check, when it returns, that it was called as its signature
says and that it returns what its signature says. The checks come after the call, not before, so that bad input meets
the function's own error, as it does for a user. They stand aside while torch traces a function, where they would be
compiled into the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
import torch
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as PEP 484 has it


def after_return(stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """Check the stand-in that jaxtyping calls after a function (the one that returns), and not the one before."""
    returns = any(
        parameter.kind is parameter.KEYWORD_ONLY and name.startswith("ret")
        for name, parameter in inspect.signature(stand_in).parameters.items()
    )
    if not returns:
        return stand_in
    try:
        return _check(stand_in)
    except BeartypeDecorHintException:  # an annotation that no run can check, such as a plain Protocol
        return stand_in


class _OffWhileTracing(type(jaxtyping.config)):
    @property
    def jaxtyping_disable(self) -> bool:
        return torch.compiler.is_compiling() or self.disabled

    @jaxtyping_disable.setter
    def jaxtyping_disable(self, disabled: bool) -> None:
        self.disabled = disabled


def install(package: str) -> Any:
    """Check the signatures of a package that is not imported yet; the result's ``uninstall`` ends it."""
    if not isinstance(jaxtyping.config, _OffWhileTracing):
        disabled = jaxtyping.config.__dict__.pop("jaxtyping_disable")
        jaxtyping.config.__class__ = _OffWhileTracing
        jaxtyping.config.jaxtyping_disable = disabled
    return jaxtyping.install_import_hook(package, "signatures.after_return")
