"""A hash of any value, by type and content: the same in every process, on every day.

Neither addresses nor `PYTHONHASHSEED` play a part. Arrays are hashed by their buffers, frames column
by column, sets and dicts without an order, functions by their code, defaults and closure. A type may
bring its own rule as ``__dask_tokenize__``. What has no content, such as a lock or an open file, is
refused with the path to it.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import math
import operator
import pathlib
import re
import struct
import sys
import types
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import xxhash

BLOCK = 1 << 24
"""Bytes of an array that are copied at a time, where it does not lie in one piece."""


class Unhashable(ValueError):
    """A value has no content to hash.

    Attributes
    ----------
    path : str
        Where in the value it is, such as ``[3].lock``.
    reason : str
        What it is.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        """Say what cannot be hashed, and where it is."""
        return f"{self.reason} (at {self.path})" if self.path else self.reason


class Digest:
    """Stands for a value whose hash is known already."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        return (Digest, (self.text,))


def stable_hash(*values: Any) -> str:
    """Return the hash of values: 32 hexadecimal digits.

    >>> stable_hash({"a": 1, "b": {2, 3}}) == stable_hash({"b": {3, 2}, "a": 1})
    True

    Parameters
    ----------
    *values : object
        Anything with content.

    Raises
    ------
    Unhashable
        A `ValueError` that names what has none.
    """
    if len(values) == 1 and type(values[0]) is Digest:
        return values[0].text
    return _Hasher().digest(values[0] if len(values) == 1 else values).hex()


def digest(value: Any) -> Digest:
    """Hash a value now, so that it counts as itself wherever the result is hashed."""
    return value if type(value) is Digest else Digest(stable_hash(value))


class _Hasher:
    """One hash on its way; remembers which objects it is inside of, for values that contain themselves."""

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}
        self._path: list[str] = []

    # -- structure ------------------------------------------------------------------------------
    def digest(self, value: Any) -> bytes:
        """Hash one value."""
        kind = type(value)
        plain = _PLAIN.get(kind)
        if plain is not None:
            return xxhash.xxh3_128_digest(plain(value))
        if kind is Digest:
            return bytes.fromhex(value.text)
        identity = id(value)
        if identity in self._inside:  # it contains itself
            return _of("cycle", len(self._inside) - self._inside[identity])
        self._inside[identity] = len(self._inside)
        try:
            return self._compound(value, kind)
        except RecursionError:
            raise Unhashable("".join(self._path[:5]), "it is nested too deeply") from None
        finally:
            del self._inside[identity]

    def at(self, step: str, value: Any) -> bytes:
        """Hash a part of a value."""
        self._path.append(step)
        found = self.digest(value)
        self._path.pop()
        return found

    def refuse(self, reason: str) -> Unhashable:
        """Make the error for the value that is looked at."""
        return Unhashable("".join(self._path), reason)

    def items(self, tag: str, values: Iterable[Any]) -> bytes:
        """Hash values in their order."""
        state = xxhash.xxh3_128(tag.encode() + b"(")
        count = 0
        for count, value in enumerate(values, 1):
            state.update(self.at(f"[{count - 1}]", value))
        state.update(struct.pack("<q", count))
        return state.digest()

    def unordered(self, tag: str, values: Iterable[bytes]) -> bytes:
        """Combine digests whose order has no meaning."""
        return xxhash.xxh3_128_digest(tag.encode() + b"{" + b"".join(sorted(values)))

    def mapping(self, tag: str, values: Any) -> bytes:
        """Hash a dict, whatever the order of its keys."""
        return self.unordered(
            tag, (self.digest(key) + self.at(f"[{key!r}]"[:60], item) for key, item in values.items())
        )

    def fields(self, tag: str, value: Any, names: Iterable[str]) -> bytes:
        """Hash some attributes of an object of a class of users."""
        parts = (name.encode() + b"=" + self.at(f".{name}", getattr(value, name, None)) for name in names)
        return self.unordered(f"{tag}:{_name_of(type(value))}", parts)

    def _compound(self, value: Any, kind: type) -> bytes:
        for base in kind.__mro__:
            rule = _RULES.get(base)
            if rule is not None and (base is kind or base in _INHERITED):
                return rule(self, value)
        library = kind.__module__.partition(".")[0]
        if library in _LIBRARIES and library in sys.modules:
            found = _LIBRARIES[library](self, value)
            if found is not None:
                return found
        elif library != "numpy" and "numpy" in sys.modules and _is_array(value):
            found = _numpy(self, value)
            assert found is not None
            return found
        return self._object(value, kind)

    def _object(self, value: Any, kind: type) -> bytes:
        own = getattr(kind, "__dask_tokenize__", None)
        if own is not None:
            return self.items(f"token:{_name_of(kind)}", [value.__dask_tokenize__()])
        if dataclasses.is_dataclass(kind):
            return self.fields("dataclass", value, [field.name for field in dataclasses.fields(kind)])
        if hasattr(kind, "__pydantic_fields__"):
            extra = getattr(value, "__pydantic_extra__", None) or {}
            names = [*kind.__pydantic_fields__, *extra]
            return self.fields("model", value, names)
        if isinstance(value, tuple):
            return self.items(f"tuple:{_name_of(kind)}", tuple(value))
        return self._reduced(value, kind)

    def _reduced(self, value: Any, kind: type) -> bytes:
        """Hash what pickle would need in order to make the object again."""
        if isinstance(value, types.ModuleType):
            return _of("module", value.__name__)
        if isinstance(value, type):
            return _of("class", _name_of(value))
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise self.refuse(f"{_name_of(kind)}: {error}") from None
        if isinstance(reduced, str):
            return _of("global", kind.__module__, reduced)
        make, args, state, items, pairs = (*reduced, None, None, None, None)[:5]
        if make is not None and getattr(make, "__name__", "") in {"__newobj__", "__newobj_ex__"}:
            make = getattr(make, "__name__", "")
        parts = [b"object:", _name_of(kind).encode(), self.at("", make)]
        # Its class is known by name; the rest of the arguments is content.
        parts.append(self.items("args", [a for a in args if a is not kind]))
        if isinstance(state, dict):
            parts.append(
                self.unordered("state", (self.digest(k) + self.at(f".{k}", v) for k, v in state.items()))
            )
        else:
            parts.append(self.at("", state))
        if items is not None:
            parts.append(self.items("items", items))
        if pairs is not None:
            parts.append(
                self.unordered("pairs", (self.digest(k) + self.at(f"[{k!r}]"[:60], v) for k, v in pairs))
            )
        call = getattr(kind, "__call__", None)  # noqa: B004 - its code is part of what it does
        if isinstance(call, types.FunctionType):
            parts.append(self.at(".__call__", call))
        return xxhash.xxh3_128_digest(b"".join(parts))


def _of(*parts: Any) -> bytes:
    return xxhash.xxh3_128_digest("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"))


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# -- values without parts -----------------------------------------------------------------------


def _float(value: float) -> bytes:
    return b"f:nan" if math.isnan(value) else b"f:" + struct.pack("<d", value)


_PLAIN: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"none",
    bool: lambda value: b"b:1" if value else b"b:0",
    int: lambda value: b"i:" + hex(value).encode(),
    float: _float,
    complex: lambda value: b"c:" + _float(value.real) + b"," + _float(value.imag),
    str: lambda value: b"s:" + value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: b"y:" + value,
    bytearray: lambda value: b"ya:" + value,
    type(Ellipsis): lambda _: b"ellipsis",
    type(NotImplemented): lambda _: b"notimplemented",
}


def _text(tag: str) -> Callable[[_Hasher, Any], bytes]:
    return lambda _, value: _of(tag, value)


# -- code -----------------------------------------------------------------------------------------


def _code(hasher: _Hasher, code: types.CodeType) -> bytes:
    """Hash what a function does, not where it stands: no file, no line numbers, no comments."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return hasher.items("code", [code.co_code, *counts, *names, code.co_consts, code.co_exceptiontable])


def _function(hasher: _Hasher, function: types.FunctionType) -> bytes:
    parts: list[Any] = [function.__code__, function.__defaults__, function.__kwdefaults__]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            content = Ellipsis
        parts.append(Digest(hasher.at(f".<closure>.{name}", content).hex()))
    return hasher.items("function", parts)


def _method(hasher: _Hasher, method: types.MethodType) -> bytes:
    return hasher.items("method", [method.__func__, method.__self__])


def _builtin(hasher: _Hasher, function: Any) -> bytes:
    bound = getattr(function, "__self__", None)
    if bound is None or isinstance(bound, types.ModuleType):
        return _of("builtin", getattr(function, "__module__", ""), function.__qualname__)
    return hasher.items("builtin", [function.__qualname__, bound])


def _partial(hasher: _Hasher, value: functools.partial[Any]) -> bytes:
    return hasher.items("partial", [value.func, value.args, value.keywords])


def code_of(function: Callable[..., Any]) -> str:
    """Return the hash of what a function does: its code, defaults and closure.

    Closures hold what they like, such as locks and clients: what has no content counts by its type.
    """
    return _Lenient().digest(function).hex()


class _Lenient(_Hasher):
    """Takes the type of what it cannot hash."""

    def at(self, step: str, value: Any) -> bytes:
        depth = len(self._path)
        try:
            return super().at(step, value)
        except Unhashable:
            del self._path[depth:]
            return _of("opaque", _name_of(type(value)))


# -- the standard library ---------------------------------------------------------------------------


def _enum(hasher: _Hasher, value: enum.Enum) -> bytes:
    return hasher.items(f"enum:{_name_of(type(value))}", [value.name, value.value])


def _ordered(hasher: _Hasher, value: Any) -> bytes:
    return hasher.items("ordered", list(value.items()))


def _moment(hasher: _Hasher, value: Any) -> bytes:
    return hasher.items(type(value).__name__, [value.isoformat(), value.fold, value.tzinfo])


def _zone(hasher: _Hasher, value: dt.tzinfo) -> bytes:
    key = getattr(value, "key", None)
    return _of("zone", key) if key else hasher._reduced(value, type(value))


def _view(hasher: _Hasher, value: memoryview) -> bytes:
    return hasher.items("view", [value.format, value.shape, value.tobytes()])


_RULES: dict[type, Callable[[_Hasher, Any], bytes]] = {
    list: lambda hasher, value: hasher.items("list", value),
    tuple: lambda hasher, value: hasher.items("tuple", value),
    dict: lambda hasher, value: hasher.mapping("dict", value),
    set: lambda hasher, value: hasher.unordered("set", map(hasher.digest, value)),
    frozenset: lambda hasher, value: hasher.unordered("frozenset", map(hasher.digest, value)),
    collections.OrderedDict: _ordered,
    types.MappingProxyType: lambda hasher, value: hasher.mapping("dict", value),
    range: _text("range"),
    slice: lambda hasher, value: hasher.items("slice", [value.start, value.stop, value.step]),
    array.array: lambda hasher, value: hasher.items("array", [value.typecode, value.tobytes()]),
    memoryview: _view,
    enum.Enum: _enum,
    pathlib.PurePath: lambda _, value: _of("path", value.as_posix()),
    dt.datetime: _moment,
    dt.time: _moment,
    dt.date: lambda _, value: _of("date", value.isoformat()),
    dt.timedelta: lambda _, value: _of("delta", value.days, value.seconds, value.microseconds),
    dt.tzinfo: _zone,
    decimal.Decimal: lambda _, value: _of("decimal", str(value)),
    fractions.Fraction: _text("fraction"),
    uuid.UUID: _text("uuid"),
    re.Pattern: lambda hasher, value: hasher.items("pattern", [value.pattern, value.flags]),
    types.CodeType: _code,
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinFunctionType: _builtin,
    types.WrapperDescriptorType: lambda _, value: _of("builtin", value.__qualname__),
    types.MethodDescriptorType: lambda _, value: _of("builtin", value.__qualname__),
    functools.partial: _partial,
    operator.itemgetter: lambda hasher, value: hasher._reduced(value, type(value)),
}
_INHERITED = frozenset([enum.Enum, pathlib.PurePath, dt.tzinfo])
"""Rules that hold for subclasses, too."""


# -- numpy ------------------------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return isinstance(value, sys.modules["numpy"].ndarray)


def _numpy(hasher: _Hasher, value: Any) -> bytes | None:
    numpy = sys.modules["numpy"]
    kind = type(value)
    if isinstance(value, numpy.ma.MaskedArray):
        mask = numpy.ma.getmaskarray(value)
        data = numpy.array(value.data, copy=True, subok=False)
        data[mask] = numpy.zeros((), data.dtype)[()]  # what is under the mask is nobody's business
        return hasher.items("masked", [data, mask, numpy.asarray(value.fill_value)])
    if isinstance(value, numpy.ndarray):
        plain = numpy.asarray(value)
        if kind in {numpy.ndarray, numpy.memmap}:
            return _array(hasher, plain)
        state = dict(getattr(value, "__dict__", {}))
        return hasher.items(f"array:{_name_of(kind)}", [Digest(_array(hasher, plain).hex()), state])
    if isinstance(value, numpy.generic):
        return hasher.items("scalar", [numpy.asarray(value)])
    if isinstance(value, numpy.dtype):
        return _of("dtype", _dtype(value))
    if isinstance(value, numpy.ufunc):
        return _of("ufunc", value.__name__)
    return None


def _dtype(dtype: Any) -> str:
    return str(dtype.descr) if dtype.names else str(dtype.str)


def _array(hasher: _Hasher, value: Any) -> bytes:
    """Hash an array: type, shape, order and buffer; fields and objects one by one."""
    head = f"array|{_dtype(value.dtype)}|{value.shape}"
    if value.dtype.names:  # the gaps between fields hold anything
        return hasher.items(head, [value[name] for name in value.dtype.names])
    if value.dtype.hasobject:
        return hasher.items(head, value.reshape(-1).tolist())
    if value.dtype.kind == "f" and value.ndim == 0 and value != value:  # noqa: PLR0124 - not a number
        return _of(head, "nan")
    fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    state = xxhash.xxh3_128(f"{head}|{'F' if fortran else 'C'}|".encode())
    for block in _blocks(value.T if fortran else value):
        state.update(block.reshape(-1).view("u1"))
    return state.digest()


def _blocks(value: Any) -> Iterable[Any]:
    """Yield an array in pieces that lie in memory without gaps."""
    numpy = sys.modules["numpy"]
    if value.size == 0:
        return
    if value.flags.c_contiguous:
        yield value
        return
    rows = max(1, BLOCK * value.shape[0] // value.nbytes)
    for start in range(0, value.shape[0], rows):
        yield numpy.ascontiguousarray(value[start : start + rows])


# -- frames -----------------------------------------------------------------------------------------


def _pandas(hasher: _Hasher, value: Any) -> bytes | None:
    pandas = sys.modules["pandas"]
    if isinstance(value, pandas.DataFrame):
        columns = [
            hasher.digest(name) + hasher.at(f"[{name!r}]", value.iloc[:, position].array)
            for position, name in enumerate(value.columns)
        ]
        names = list(value.columns.names)
        return hasher.items("frame", [Digest(hasher.unordered("columns", columns).hex()), value.index, names])
    if isinstance(value, pandas.Series):
        return hasher.items("series", [value.name, value.array, value.index])
    if isinstance(value, pandas.RangeIndex):
        return hasher.items("rangeindex", [value.start, value.stop, value.step, value.name])
    if isinstance(value, pandas.MultiIndex):
        levels = [value.get_level_values(number).array for number in range(value.nlevels)]
        return hasher.items("multiindex", [list(value.names), levels])
    if isinstance(value, pandas.Index):
        return hasher.items("index", [value.name, value.array])
    if isinstance(value, pandas.Categorical):
        return hasher.items("categorical", [value.categories, numpy_of(value.codes), value.ordered])
    if isinstance(value, pandas.api.extensions.ExtensionArray):
        return _extension(hasher, value)
    if isinstance(value, pandas.Timestamp):
        return hasher.items("timestamp", [value.value, value.tzinfo])
    if isinstance(value, pandas.Timedelta):
        return _of("pandas.timedelta", value.value)
    if value is pandas.NaT or value is pandas.NA:
        return _of("missing", type(value).__name__)
    return None


def numpy_of(value: Any) -> Any:
    """Return an array of numpy."""
    return sys.modules["numpy"].asarray(value)


def _extension(hasher: _Hasher, value: Any) -> bytes:
    """Hash a column of pandas by what it is made of."""
    pandas, numpy = sys.modules["pandas"], sys.modules["numpy"]
    tag = f"column|{value.dtype}"
    arrow = getattr(value, "_pa_array", None)
    if arrow is not None:
        return hasher.items(tag, [arrow])
    plain = getattr(value, "_ndarray", None)
    if plain is not None:  # numpy's own, moments, texts
        return hasher.items(tag, [_texts(plain) if plain.dtype == object else plain])
    if hasattr(value, "_mask") and hasattr(value, "_data"):
        mask = numpy_of(value.isna())
        return hasher.items(tag, [mask, numpy.where(mask, numpy.zeros((), value._data.dtype), value._data)])
    if isinstance(value.dtype, pandas.IntervalDtype):
        return hasher.items(tag, [value.left, value.right, value.closed])
    return hasher.items(tag, [_texts(numpy.asarray(value, dtype=object))])


def _texts(values: Any) -> Any:
    """Return an array of texts as their lengths and one text, which is much faster; any other as it is."""
    pandas, numpy = sys.modules["pandas"], sys.modules["numpy"]
    if values.ndim != 1 or not len(values):
        return values
    missing = pandas.isna(values)
    present = values[~missing]
    if pandas.api.types.infer_dtype(present, skipna=False) != "string":
        return values
    if not all(type(text) is str for text in present):
        return values
    gaps: Any = missing if missing.any() else None
    kinds = sorted({type(gap).__name__ for gap in values[missing]}) if gaps is not None else []
    lengths = numpy.fromiter(map(len, present), "i8", len(present))
    return ["texts", gaps, kinds, lengths, "".join(present)]


def _polars(hasher: _Hasher, value: Any) -> bytes | None:
    polars = sys.modules["polars"]
    if isinstance(value, polars.DataFrame):
        columns = [_of(name) + hasher.at(f"[{name!r}]", value.get_column(name)) for name in value.columns]
        return hasher.items("polars", [value.height, Digest(hasher.unordered("columns", columns).hex())])
    if isinstance(value, polars.Series):
        try:
            content: Any = value.to_arrow()
        except ImportError:
            content = value.to_list()
        return hasher.items("polars.series", [value.name, str(value.dtype), content])
    if isinstance(value, polars.LazyFrame):
        return hasher.items("polars.lazy", [value.serialize()])
    return None


def _arrow(hasher: _Hasher, value: Any) -> bytes | None:
    pyarrow = sys.modules["pyarrow"]
    if isinstance(value, (pyarrow.Table, pyarrow.RecordBatch)):
        columns = [
            _of(name, value.schema.field(position).type) + hasher.at(f"[{name!r}]", value.column(position))
            for position, name in enumerate(value.schema.names)
        ]
        return hasher.items("table", [value.num_rows, Digest(hasher.unordered("columns", columns).hex())])
    if isinstance(value, pyarrow.ChunkedArray):
        whole = value.combine_chunks()
        return hasher.digest(whole)
    if isinstance(value, pyarrow.Array):
        return _arrow_array(hasher, value)
    if isinstance(value, pyarrow.Scalar):
        return hasher.items("arrow.scalar", [str(value.type), value.as_py()])
    if isinstance(value, (pyarrow.Schema, pyarrow.DataType, pyarrow.Field)):
        return _of("arrow.type", str(value))
    return None


def _arrow_array(hasher: _Hasher, value: Any) -> bytes:
    """Hash an Arrow array by its values: slices, chunks and what lies under nulls leave no trace."""
    pyarrow = sys.modules["pyarrow"]
    from pyarrow import compute

    kind, types_ = value.type, pyarrow.types
    tag = f"arrow|{kind}|{len(value)}"
    if value.null_count == len(value):
        return hasher.items(tag, ["nulls"])
    nulls = numpy_of(value.is_null().to_numpy(zero_copy_only=False)) if value.null_count else None
    if types_.is_dictionary(kind):
        return hasher.items(tag, [value.dictionary_decode()])
    if types_.is_integer(kind) or types_.is_floating(kind) or types_.is_boolean(kind):
        filled = value.fill_null(False if types_.is_boolean(kind) else 0) if nulls is not None else value
        return hasher.items(tag, [nulls, filled.to_numpy(zero_copy_only=False)])
    if types_.is_temporal(kind) and getattr(kind, "bit_width", 0) in {32, 64}:
        return hasher.items(tag, [value.cast(pyarrow.int64() if kind.bit_width == 64 else pyarrow.int32())])
    text = types_.is_string(kind) or types_.is_large_string(kind)
    if text or types_.is_binary(kind) or types_.is_large_binary(kind):
        filled = value.fill_null("" if text else b"") if nulls is not None else value
        lengths = compute.binary_length(filled)
        return hasher.items(tag, [nulls, numpy_of(lengths), _letters(filled)])
    if types_.is_list(kind) or types_.is_large_list(kind):
        return hasher.items(tag, [nulls, compute.list_value_length(value), value.flatten()])
    if types_.is_struct(kind):
        return hasher.items(tag, [nulls, value.flatten()])
    return hasher.items(tag, [value.to_pylist()])


def _letters(value: Any) -> Any:
    """Return the bytes of the texts of an Arrow array, one after the other."""
    numpy = sys.modules["numpy"]
    width = "i8" if str(value.type).startswith("large") else "i4"
    _, offsets, data = value.buffers()
    if data is None:
        return b""
    places = numpy.frombuffer(offsets, width)[value.offset : value.offset + len(value) + 1]
    return numpy.frombuffer(data, "u1")[places[0] : places[-1]]


def _xarray(hasher: _Hasher, value: Any) -> bytes | None:
    xarray = sys.modules["xarray"]
    if isinstance(value, xarray.Dataset):
        return hasher.items("dataset", [dict(value.variables), sorted(map(str, value.coords)), value.attrs])
    if isinstance(value, xarray.DataArray):
        coords = {name: coord.variable for name, coord in value.coords.items()}
        return hasher.items("dataarray", [value.name, value.variable, coords])
    if isinstance(value, xarray.Variable):
        content = value.data
        return hasher.items("variable", [value.dims, content, value.attrs])
    return None


_LIBRARIES: dict[str, Callable[[_Hasher, Any], bytes | None]] = {
    "numpy": _numpy,
    "pandas": _pandas,
    "polars": _polars,
    "pyarrow": _arrow,
    "xarray": _xarray,
}
