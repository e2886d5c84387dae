"""What arrays in the arguments are to a function: views that refuse writes, copies, or the thing itself."""

from __future__ import annotations

import sys
from typing import Any

INPUT_DEPTH = 5  # containers inside one another that are searched for arrays
INPUT_ITEMS = 10_000  # items of a container that are looked at in search of a first array


def guarded(value: Any, mode: str) -> Any:
    """Guard one value, which other tasks may see too."""
    return Guard(mode).values((value,))[0]


class Guard:
    """Makes of the arguments of one call what its `inputs` promise, whatever the backend hands over.

    Containers, dataclasses and models are searched to a bounded depth, and copied where something in
    them changes. Under "readonly" arrays become views that refuse writes, and frames become copies on
    write; under "copy" both become the function's own.

    Parameters
    ----------
    mode : {"readonly", "copy", "shared"}
        The option `inputs` of the task.
    """

    def __init__(self, mode: str) -> None:
        self.copies = mode == "copy"
        self._idle = mode == "shared"
        self._all = True
        self._made: dict[int, tuple[Any, Any]] = {}  # by identity; an id is good while its object lives

    def values(self, values: Any) -> list[Any]:
        """Guard values of other tasks, and what was put."""
        if self._idle:
            return list(values)
        return [self._guarded(value, 0) for value in values]

    def arguments(self, args: Any, kwargs: Any, *, private: bool) -> tuple[Any, Any]:
        """Guard complete arguments.

        Parameters
        ----------
        args, kwargs
            Of the function; what `values` has answered may be among them.
        private : bool
            They were unpickled for this call: what can be written to needs no copy.
        """
        if self._idle or (nothing_in(args) and nothing_in(kwargs.values())):
            return args, kwargs
        self._all = not private
        args = tuple([self._guarded(value, 0) for value in args])
        return args, {name: self._guarded(value, 0) for name, value in kwargs.items()} if kwargs else kwargs

    def _guarded(self, value: Any, depth: int) -> Any:
        kind = type(value)
        try:
            treatment = _treatments[kind]
        except KeyError:
            treatment = _treatments[kind] = _treatment(kind)
        if treatment is None or depth > INPUT_DEPTH:
            return value
        found = self._made.get(id(value))
        if found is not None:
            return found[1]
        self._made[id(value)] = value, value  # it may hold itself
        try:
            guarded = treatment(self, value, depth)
        except Exception:  # an odd class: better its own object than none
            guarded = value
        self._made[id(value)] = value, guarded
        self._made[id(guarded)] = guarded, guarded
        return guarded

    # -- arrays ---------------------------------------------------------------------------------
    def _array(self, value: Any, depth: int) -> Any:
        writable = value.flags.writeable
        if self.copies:
            return value.copy(order="K") if self._all or not writable else value
        if writable:
            value = value.view()
            value.setflags(write=False)
        return value

    def _masked(self, value: Any, depth: int) -> Any:
        guarded = self._array(value, depth)
        mask = guarded._mask
        if (
            not self.copies and hasattr(mask, "shape") and mask.shape
        ):  # a write of `masked` goes to the mask only
            if guarded is value:
                guarded = value.view()
            guarded._mask = self._array(mask, depth)
        return guarded

    def _sparse(self, value: Any, depth: int) -> Any:
        if self.copies or not hasattr(value, "data") or value.format in {"lil", "dok"}:
            return value.copy()
        guarded = _copy(value)
        for name, item in list(vars(guarded).items()):
            vars(guarded)[name] = self._guarded(item, depth + 1)
        return guarded

    # -- frames ---------------------------------------------------------------------------------
    def _frame(self, value: Any, depth: int) -> Any:
        if not self.copies and _copies_on_write():
            return value.copy(deep=False)
        return value.copy(deep=True) if self._all or self.copies else value

    def _clone(self, value: Any, depth: int) -> Any:
        return value.clone()

    def _labelled(self, value: Any, depth: int) -> Any:
        if self.copies:
            return value.copy(deep=True)
        guarded = value.copy(deep=False)
        if hasattr(guarded, "data_vars"):
            variables = list(guarded.variables.values())
        elif hasattr(guarded, "coords"):
            variables = [guarded.variable, *guarded.coords.variables.values()]
        else:
            variables = [guarded]
        for variable in variables:
            data = variable._data
            if _treatment(type(data)) is Guard._array:  # no index, and nothing lazy
                variable.data = self._array(data, depth)
        return guarded

    # -- containers -----------------------------------------------------------------------------
    def _list(self, value: Any, depth: int) -> Any:
        if nothing_in(value):
            return value
        changed = self._changed(enumerate(value), depth)
        if not changed:
            return value
        items = list(value)
        for place, item in changed.items():
            items[place] = item
        kind = type(value)
        if kind is list:
            return items
        return kind(*items) if hasattr(value, "_fields") else kind(items)

    def _dict(self, value: Any, depth: int) -> Any:
        if nothing_in(value.values()):
            return value
        changed = self._changed(value.items(), depth)
        return {**value, **changed} if changed else value

    def _fields(self, value: Any, depth: int) -> Any:
        names = [name for name in value.__dataclass_fields__ if hasattr(value, name)]
        changed = self._changed(((name, getattr(value, name)) for name in names), depth)
        if not changed:
            return value
        guarded = _copy(value)
        for name, item in changed.items():
            object.__setattr__(guarded, name, item)
        return guarded

    def _model(self, value: Any, depth: int) -> Any:
        names = type(value).__pydantic_fields__
        changed = self._changed(((name, getattr(value, name)) for name in names), depth)
        return value.model_copy(update=changed) if changed else value

    def _changed(self, items: Any, depth: int) -> dict[Any, Any]:
        changed: dict[Any, Any] = {}
        for number, (place, item) in enumerate(items):
            if number == INPUT_ITEMS and not changed:
                break
            guarded = self._guarded(item, depth + 1)
            if guarded is not item:
                changed[place] = guarded
        return changed


def nothing_in(items: Any) -> bool:
    """Whether all items are of classes that are handed over as they are; quick for long lists of numbers."""
    return all(_treatments.get(kind, items) is None for kind in set(map(type, items)))


def _copy(value: Any) -> Any:
    import copy

    return copy.copy(value)


_treatments: dict[type, Any] = dict.fromkeys(
    (type(None), bool, int, float, complex, str, bytes, bytearray, set, frozenset)
)
_treatments.update({list: Guard._list, tuple: Guard._list, dict: Guard._dict})


def _treatment(kind: type) -> Any:
    """Return the method of `Guard` for a class, None for what is handed over as it is."""
    for base in kind.__mro__:
        library, name = base.__module__.partition(".")[0], base.__name__
        if library in {"numpy", "pandas", "polars", "xarray"}:
            known = _KNOWN.get(f"{library}.{name}")
            if known is not None:
                return known
        elif base.__module__.startswith("scipy.sparse"):
            return Guard._sparse
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return Guard._list
    if hasattr(kind, "__dataclass_fields__"):
        return Guard._fields
    return Guard._model if hasattr(kind, "__pydantic_fields__") else None


_KNOWN = {
    "numpy.MaskedArray": Guard._masked,
    "numpy.ndarray": Guard._array,
    "pandas.NDFrame": Guard._frame,
    "polars.DataFrame": Guard._clone,
    "polars.Series": Guard._clone,
    "xarray.DataArray": Guard._labelled,
    "xarray.Dataset": Guard._labelled,
    "xarray.Variable": Guard._labelled,
}


def _copies_on_write() -> bool:
    """Whether a shallow copy of a pandas frame is safe from writes to it."""
    pandas = sys.modules["pandas"]
    if int(pandas.__version__.partition(".")[0]) >= 3:
        return True
    return pandas.options.mode.copy_on_write is True
