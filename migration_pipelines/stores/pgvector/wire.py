"""PostgreSQL's COPY BINARY to and from Arrow columns, without a Python object for each record.

A stream is a signature, rows and a trailer; a row is the number of its fields and then, field by field, a
length (-1 for NULL) and so many octets, everything big-endian
(https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format"). Here a field is an Arrow binary
array: packing joins such arrays, and the values of the result lie in memory as the stream wants them;
unpacking lays an array of all the pieces over the received octets and takes every k-th.

The inside of a vector is pgvector's own (`vector_send`, `halfvec_send`, `sparsevec_send` in its sources),
that of a bit string PostgreSQL's (`varbit_send`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from migration_pipelines.batch import dense_matrix, dense_vectors

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
# Dimensions of a sparse vector without a bound: SPARSEVEC_MAX_DIM of pgvector.
SPARSE_MAX_DIMENSIONS = 1_000_000_000
# Unpacked at once: fewer cost more calls, more don't stay in the processor's caches.
_GROUP_BYTES = 1 << 22

_Octets = npt.NDArray[np.uint8]


class CopyFormatError(ValueError):
    """The octets aren't the rows that were asked for."""


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────


def pack(fields: Sequence[pa.Array]) -> pa.Buffer:
    """Return the rows, without header and trailer, of binary arrays; null is NULL."""
    pieces: list[Any] = [pa.scalar(len(fields).to_bytes(2, "big"), pa.binary())]
    for field in fields:
        pieces += [_sizes(field), field]
    rows = pc.binary_join_element_wise(*pieces, b"", null_handling="replace", null_replacement=b"")
    _, offsets, data = rows.buffers()
    ends = np.frombuffer(offsets, np.int32)
    return data.slice(int(ends[rows.offset]), int(ends[rows.offset + len(rows)] - ends[rows.offset]))


def text_field(column: pa.Array) -> pa.Array:
    """Return the field of a column of text."""
    return column.cast(pa.binary())


def jsonb_field(column: pa.Array) -> pa.Array:
    """Return the field of a column of JSON text: the version of jsonb's binary form, then the text."""
    return pc.binary_join_element_wise(pa.scalar(b"\x01"), column.cast(pa.binary()), b"")


def int_field(column: pa.Array, octets: int) -> pa.Array:
    """Return the field of a column of text of integers, for a type of so many octets.

    Raises
    ------
    pyarrow.ArrowInvalid
        A number is out of range.
    """
    numbers = column.cast(getattr(pa, f"int{8 * octets}")())
    return _fixed(numbers.to_numpy(zero_copy_only=False).astype(f">i{octets}"))


def uuid_field(column: pa.Array) -> pa.Array:
    """Return the field of a column of canonical UUID text."""
    digits = pc.replace_substring(column, "-", "")
    octets = np.frombuffer(bytes.fromhex("".join(digits.to_pylist())), np.uint8)
    return _fixed(octets.reshape(len(column), 16))


def float_field(column: pa.Array, dtype: str) -> pa.Array:
    """Return the `vector` (dtype f4) or `halfvec` (f2) field of a column of dense vectors."""
    matrix = dense_matrix(column)
    dimensions = matrix.shape[1]
    rows = np.empty(
        len(matrix), [("dimensions", ">i2"), ("unused", ">i2"), ("values", f">{dtype}", (dimensions,))]
    )
    rows["dimensions"], rows["unused"], rows["values"] = dimensions, 0, matrix
    return _with_nulls(_fixed(rows), column)


def bit_field(column: pa.Array, dimensions: int) -> pa.Array:
    """Return the `bit(n)` field of a column of packed octets.

    Raises
    ------
    ValueError
        A bit beyond the dimensions is set: the server would clear it without a word.
    """
    matrix = dense_matrix(column)
    spare = 8 * matrix.shape[1] - dimensions
    if spare and (matrix[:, -1][column.is_valid().to_numpy(zero_copy_only=False)] & ((1 << spare) - 1)).any():
        raise ValueError(f"a bit vector has bits set beyond its {dimensions} dimensions")
    rows = np.empty(len(matrix), [("bits", ">i4"), ("octets", "u1", (matrix.shape[1],))])
    rows["bits"], rows["octets"] = dimensions, matrix
    return _with_nulls(_fixed(rows), column)


def sparse_field(column: pa.Array, dimensions: int) -> pa.Array:
    """Return the `sparsevec` field of a column of indices and values.

    Raises
    ------
    ValueError
        An index stands twice or is out of range, or a value is zero: pgvector keeps none of these.
    """
    return pa.array(
        [None if item is None else _sparse_octets(item, dimensions) for item in column.to_pylist()],
        pa.binary(),
    )


def _sparse_octets(item: Mapping[str, Any], dimensions: int) -> bytes:
    indices, values = np.asarray(item["indices"], np.int64), np.asarray(item["values"], np.float32)
    order = np.argsort(indices, kind="stable")
    indices, values = indices[order], values[order]
    if (np.diff(indices) <= 0).any() or (indices >= dimensions).any():
        raise ValueError(f"a sparse vector repeats an index or exceeds its {dimensions} dimensions")
    if (values == 0).any():
        raise ValueError("a sparse vector has an entry of 0, which sparsevec can't hold")
    head = np.array([dimensions, len(indices), 0], ">i4").tobytes()
    return head + indices.astype(">i4").tobytes() + values.astype(">f4").tobytes()


def _sizes(field: pa.Array) -> pa.Array:
    sizes = pc.fill_null(pc.binary_length(field), -1)
    return _fixed(sizes.to_numpy(zero_copy_only=False).astype(">i4"))


def _fixed(rows: npt.NDArray[Any]) -> pa.Array:
    """Return the binary array of the octets of each row of an array."""
    width = rows.itemsize * int(np.prod(rows.shape[1:]))
    offsets = np.arange(0, (len(rows) + 1) * width, width, dtype=np.int32)
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return pa.Array.from_buffers(pa.binary(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _with_nulls(field: pa.Array, column: pa.Array) -> pa.Array:
    if not column.null_count:
        return field
    return pc.if_else(column.is_valid(), field, pa.scalar(None, pa.binary()))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class RowGroup:
    """Rows of a stream, one after the other, and the octets of each; both good until the next group."""

    data: memoryview
    sizes: Sequence[int]


def row_groups(chunks: Iterable[bytes], *, max_records: int) -> Iterator[RowGroup]:
    """Yield the rows of a stream in groups, checking that it begins and ends as it must.

    The server sends each row as one message (protocol, "COPY Operations"), which the driver hands on as
    one chunk; the signature comes with the first. Chunks are copied into one place at once, which every
    group uses again: kept until a group is full, each would lie in new memory, and cost more than its copy.

    Raises
    ------
    CopyFormatError
        The stream has no signature or no trailer: what came may not be everything.
    """
    stream = iter(chunks)
    first = bytes(next(stream, b""))
    if first[: len(HEADER)] != HEADER:
        raise CopyFormatError("the reply is no binary COPY stream")
    place = io.BytesIO()
    write, end = place.write, place.tell
    last = first[len(HEADER) :]
    sizes = [write(last)] if last else []
    for last in stream:
        if len(sizes) >= max_records or end() >= _GROUP_BYTES:
            # The newest chunk may be the trailer: it is never part of a full group.
            with place.getbuffer()[: end()] as data:
                yield RowGroup(data, sizes)
            place.seek(0)
            sizes = []
        sizes.append(write(last))
    if last != TRAILER:
        raise CopyFormatError("the reply ends before its trailer")
    if len(sizes) > 1:
        with place.getbuffer()[: end() - len(TRAILER)] as data:
            yield RowGroup(data, sizes[:-1])


def unpack(group: RowGroup, skips: Sequence[int]) -> list[pa.Array]:
    """Return the fields of rows as binary arrays of their own memory, null for NULL.

    Parameters
    ----------
    skips
        For each field, how many leading octets to leave out.

    Raises
    ------
    CopyFormatError
        The rows don't have these fields.
    """
    data, rows = group.data, len(group.sizes)
    ends = np.cumsum(np.fromiter(group.sizes, np.int64, rows))
    starts = np.concatenate([[0], ends[:-1]])
    if len(data) < 2 or (_integers(data, starts, 2) != len(skips)).any():
        raise CopyFormatError(f"the reply's rows don't have {len(skips)} fields")
    # Pieces of a row: its head and first length | first value | second length | second value | …
    bounds = np.empty((rows, 2 * len(skips)), np.int32)
    nulls = []
    at = starts + 2
    bounds[:, 0] = starts
    for number, skip in enumerate(skips):
        sizes = _integers(data, at, 4)
        nulls.append(sizes < 0)
        at = at + 4
        bounds[:, 2 * number + 1] = at + np.where(sizes < 0, 0, skip)
        at = at + np.maximum(sizes, 0)
        if number + 1 < len(skips):
            bounds[:, 2 * number + 2] = at
    if (at != ends).any() or (np.diff(bounds, axis=1) < 0).any():
        raise CopyFormatError("the reply's rows are malformed")
    offsets = np.append(bounds.reshape(-1), np.int32(len(data)))
    pieces = pa.Array.from_buffers(
        pa.binary(), bounds.size, [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )
    firsts = np.arange(rows, dtype=np.int32) * np.int32(bounds.shape[1])
    return [
        pieces.take(pa.array(firsts + np.int32(2 * number + 1), mask=null if null.any() else None))
        for number, null in enumerate(nulls)
    ]


def text_column(field: pa.Array) -> pa.Array:
    """Return the column of a field of text; the server has checked that it is UTF-8."""
    return field.view(pa.string())


def int_column(field: pa.Array, octets: int) -> pa.Array:
    """Return the column of text of a field of integers of so many octets."""
    numbers = np.frombuffer(_values(field), f">i{octets}", len(field))
    return pa.array(numbers.astype(f"<i{octets}")).cast(pa.string())


def uuid_column(field: pa.Array) -> pa.Array:
    """Return the column of canonical text of a field of UUIDs."""
    digits = np.frombuffer(_values(field)[: 16 * len(field)].hex().encode(), np.uint8).reshape(-1, 32)
    text = np.full((len(field), 36), ord("-"), np.uint8)
    for start, stop, at in ((0, 8, 0), (8, 12, 9), (12, 16, 14), (16, 20, 19), (20, 32, 24)):
        text[:, at : at + stop - start] = digits[:, start:stop]
    return _fixed(text).view(pa.string())


def dense_column(field: pa.Array, dtype: str, *, width: int) -> pa.Array:
    """Return the column of dense vectors of a field that was unpacked from its values on.

    Parameters
    ----------
    dtype
        `f4` for vector, `f2` for halfvec, `u1` for bit.
    width
        Elements of each vector.

    Raises
    ------
    CopyFormatError
        A vector has another number of elements.
    """
    present = field.is_valid().to_numpy(zero_copy_only=False)
    octets = width * np.dtype(dtype).itemsize
    sizes = pc.binary_length(field).drop_null().to_numpy()
    if (sizes != octets).any():
        found = sorted({int(size) // np.dtype(dtype).itemsize for size in sizes})
        raise CopyFormatError(f"vectors of {found[:5]} elements stand among those of {width}")
    values = np.frombuffer(_values(field), f">{dtype}", len(sizes) * width).reshape(len(sizes), width)
    if present.all():
        return dense_vectors(values.astype(f"<{dtype}"))
    matrix = np.zeros((len(field), width), f"<{dtype}")
    matrix[present] = values
    return dense_vectors(matrix, missing=~present)


def sparse_column(field: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the column, of Arrow type `kind`, of a field of `sparsevec`."""
    return pa.array([None if item is None else _sparse_value(item) for item in field.to_pylist()], kind)


def _sparse_value(octets: bytes) -> dict[str, _Octets]:
    entries = int.from_bytes(octets[4:8], "big")
    indices = np.frombuffer(octets, ">i4", entries, 12).astype(np.uint32)
    values = np.frombuffer(octets, ">f4", entries, 12 + 4 * entries).astype(np.float32)
    return {"indices": indices, "values": values}  # type: ignore[dict-item]


def _integers(data: memoryview, at: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """Return int64[len(at)]: the big-endian signed integers at some places; past the end, the last one."""
    # An element at every octet, each overlapping the next: indexing it reads unaligned.
    everywhere = np.ndarray(max(0, len(data) - width + 1), f">i{width}", data, strides=(1,))
    return everywhere[np.minimum(at, len(everywhere) - 1)].astype(np.int64)


def _values(field: pa.Array) -> bytes:
    data = field.buffers()[2]
    return b"" if data is None else memoryview(data)  # type: ignore[return-value]
