"""Leave word on the objects that a growth replaces: each says what became of it when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ds_sparkling.engine.hooks import recast
from ds_sparkling.errors import GrowthError

#: What may be asked of a parameter that is gone, as those who add up memory ask of whatever tensor they find.
_STILL_TRUE = (Tensor.untyped_storage, Tensor.device.__get__, Tensor.dtype.__get__, Tensor.is_cuda.__get__)  # type: ignore[attr-defined]

_FATE = "_what_became_of_it"


def leave_word(thing: Any, what: str, instead: str) -> None:
    """Empty ``thing``, and have it raise GrowthError from now on; ``isinstance`` finds it what it was.

    Args:
        thing: an object with a ``__dict__``; a parameter keeps its (emptied) data.
        what: it was, for the error.
        instead: what to use in its place, for the error.
    """
    vars(thing).clear()
    vars(thing)[_FATE] = f"this {what} was grown and is gone; go on with {instead}"
    gone = _GoneParameter if isinstance(thing, nn.Parameter) else type(type(thing).__name__, (_Gone, type(thing)), {})
    recast(thing, gone)


def _fate(thing: Any) -> str:
    return str(object.__getattribute__(thing, "__dict__")[_FATE])


class _Gone:
    """Comes first among the classes of what is gone."""

    def __init_subclass__(cls) -> None:
        """The class's own shall not hear of it: libraries keep lists of theirs."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # Python's own, which isinstance and the like ask for
            return object.__getattribute__(self, name)
        raise GrowthError(f"{_fate(self)} (asked for {name!r})")

    def __getattr__(self, name: str) -> Any:  # only for names that Python asks for and that aren't there
        raise AttributeError(name)

    def __setattr__(self, name: str, _value: object) -> None:
        raise GrowthError(f"{_fate(self)} (asked to set {name!r})")

    def __call__(self, *_args: object, **_kwargs: object) -> Any:
        raise GrowthError(_fate(self))

    def __reduce_ex__(self, _protocol: object) -> Any:
        raise GrowthError(_fate(self))

    def __repr__(self) -> str:
        return f"<{_fate(self)}>"

    def __del__(self) -> None:
        """Nothing is left that the class's own would have to clean up."""


class _GoneParameter(nn.Parameter):
    """A parameter that a growth has replaced: torch tells its class of every use."""

    @classmethod
    def __torch_function__(
        cls, func: Any, _types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _STILL_TRUE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        gone = next(leaf for leaf in tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, cls))
        if func is Tensor.__repr__:
            return f"<{_fate(gone)}>"
        raise GrowthError(_fate(gone))

    def __deepcopy__(self, _memo: object) -> Any:
        raise GrowthError(_fate(self))

    def __reduce_ex__(self, _protocol: object) -> Any:
        raise GrowthError(_fate(self))
