"""Batches in the shape of a table."""

from __future__ import annotations

import datetime
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_lance.errors import BadInputError, BadVectorError, SchemaError
from gpu_lance.ingest.align import align, first_failure, shorten
from gpu_lance.ingest.vectors import handle_bad_vectors
from gpu_lance.types import OnBadVectors

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("text", pa.utf8()),
        pa.field("vector", pa.list_(pa.float32(), 2)),
    ],
    metadata={"k": "v"},
)


def batch(**columns):
    return pa.record_batch(columns)


def aligned(array, wanted, nullable=True, first_row=0):
    schema = pa.schema([pa.field("c", wanted, nullable)])
    result = align(pa.record_batch({"c": array}), schema, first_row=first_row)
    result.validate(full=True)
    return result.column("c")


def test_order_types_and_metadata_are_the_tables():
    given_batch = batch(
        vector=pa.array([[1.0, 2.0], None], pa.list_(pa.float64())),
        text=pa.array(["a", None], pa.large_utf8()),
        id=pa.array([1, 2], pa.int32()),
    )
    result = align(given_batch, SCHEMA)
    assert result.schema.equals(SCHEMA, check_metadata=True)
    assert result.to_pylist() == [
        {"id": 1, "text": "a", "vector": [1.0, 2.0]},
        {"id": 2, "text": None, "vector": None},
    ]


def test_a_fitting_batch_shares_its_memory():
    fit = pa.RecordBatch.from_arrays(
        [pa.array([1]), pa.array(["a"]), pa.array([[1, 2]], SCHEMA.field("vector").type)],
        schema=SCHEMA,
    )
    result = align(fit, SCHEMA)
    assert result.equals(fit, check_metadata=True)
    for before, after in zip(fit.columns, result.columns, strict=True):
        addresses = [buffer and buffer.address for buffer in before.buffers()]
        assert addresses == [buffer and buffer.address for buffer in after.buffers()]


# missing and unknown columns


def test_missing_columns_are_null_left_out_or_refused():
    result = align(batch(id=pa.array([1, 2])), SCHEMA, allow_missing={"vector"})
    assert result.schema.names == ["id", "text"]
    assert result.column("text").to_pylist() == [None, None]
    assert align(batch(id=pa.array([1])), SCHEMA).column("vector").type == pa.list_(pa.float32(), 2)
    with pytest.raises(SchemaError, match=r"'id' is missing.*takes no nulls.*'text'"):
        align(batch(text=pa.array(["a"])), SCHEMA)


def test_a_batch_of_nothing_but_columns_to_fill_keeps_its_rows():
    schema = pa.schema({"v": pa.list_(pa.float32(), 2)})
    empty = pa.record_batch({"v": pa.nulls(3)}).select([])
    assert align(empty, schema, allow_missing={"v"}).num_rows == 3


def test_unknown_and_doubled_columns_are_refused():
    with pytest.raises(SchemaError, match=r"no column 'txt'.*'id', 'text', 'vector'"):
        align(batch(id=pa.array([1]), txt=pa.array(["a"])), SCHEMA)
    double = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=["id", "id"])
    with pytest.raises(SchemaError, match="more than one column 'id'"):
        align(double, SCHEMA)


def test_nulls_where_none_may_be_are_named():
    with pytest.raises(BadInputError, match=r"Row 12, column 'id'.*2 such rows"):
        align(batch(id=pa.array([1, 2, None, None])), SCHEMA, first_row=10)
    with pytest.raises(BadInputError, match="Row 0, column 'id'"):
        align(batch(id=pa.nulls(2)), SCHEMA)


def test_a_column_to_fill_may_hold_nulls():
    schema = pa.schema([pa.field("v", pa.list_(pa.float32(), 2), nullable=False)])
    result = align(batch(v=pa.nulls(2)), schema, allow_missing={"v"})
    assert result.column("v").to_pylist() == [None, None]
    assert result.column("v").type == pa.list_(pa.float32(), 2)


# casts

UTC = datetime.UTC


@pytest.mark.parametrize(
    ("array", "wanted", "expected"),
    [
        (pa.array([1, None], pa.int32()), pa.int64(), [1, None]),
        (pa.array([1], pa.uint8()), pa.float32(), [1.0]),
        (pa.array(["a"], pa.string_view()), pa.utf8(), ["a"]),
        (pa.array(["a"], pa.utf8()), pa.large_utf8(), ["a"]),
        (pa.array(["a", "b", "a"]), pa.dictionary(pa.int32(), pa.utf8()), ["a", "b", "a"]),
        (pa.array(["a", None]).dictionary_encode(), pa.utf8(), ["a", None]),
        (pa.nulls(2), pa.dictionary(pa.int32(), pa.utf8()), [None, None]),
        (pa.nulls(1), pa.struct({"a": pa.int8()}), [None]),
        (pa.array([b"a"]), pa.utf8(), ["a"]),
        (pa.array([5]), pa.utf8(), ["5"]),
        (
            pa.array([datetime.datetime(2024, 1, 2, 3)], pa.timestamp("s")),
            pa.timestamp("us", "UTC"),
            [datetime.datetime(2024, 1, 2, 3, tzinfo=UTC)],
        ),
        (pa.array([datetime.datetime(2024, 1, 2)]), pa.date32(), [datetime.date(2024, 1, 2)]),
        (pa.array([[1, 2], None]), pa.list_(pa.float64()), [[1.0, 2.0], None]),
        (pa.array([[[1.0, 2.0]]]), pa.list_(pa.list_(pa.float32(), 2)), [[[1.0, 2.0]]]),
        (
            pa.array([{"b": 1, "a": "x"}, None]),
            pa.struct({"a": pa.large_utf8(), "b": pa.float64(), "c": pa.int8()}),
            [{"a": "x", "b": 1.0, "c": None}, None],
        ),
    ],
)
def test_values_survive_the_cast(array, wanted, expected):
    result = aligned(array, wanted)
    assert result.type == wanted
    assert result.to_pylist() == expected


@pytest.mark.parametrize(
    ("array", "wanted", "row", "value"),
    [
        (pa.array([1, 2, 300, 400]), pa.int8(), 2, "300"),
        (pa.array([1.0, 1.5]), pa.int64(), 1, "1.5"),
        (pa.array(["1", "x", "y"]), pa.int64(), 1, "'x'"),
        (pa.array([b"a", b"\xff"]), pa.utf8(), 1, "xff"),
        (pa.array([-1]), pa.uint8(), 0, "-1"),
        (pa.array([None, [1, 2], [3]], pa.list_(pa.int64())), pa.list_(pa.int64(), 2), 2, "3"),
    ],
)
def test_a_value_that_does_not_fit_is_named(array, wanted, row, value):
    with pytest.raises(BadInputError, match=f"Row {100 + row}, column 'c'.*{value}"):
        aligned(array, wanted, first_row=100)


def test_types_that_have_nothing_in_common_are_a_schema_error():
    with pytest.raises(SchemaError, match=r"'c' is .*float.* cannot take string.*row 7"):
        aligned(pa.array([None, None, "a"]), pa.list_(pa.float32(), 2), first_row=5)


def test_a_struct_loses_no_field_in_silence():
    wanted = pa.list_(pa.struct({"a": pa.struct({"b": pa.int64()})}))
    with pytest.raises(SchemaError, match=r"'c.a' has no field 'x'; it has 'b'"):
        aligned(pa.array([[{"a": {"b": 1, "x": 2}}]]), wanted)


def test_nested_nulls_are_found_but_not_under_a_null_parent():
    inner = pa.struct([pa.field("a", pa.int64(), nullable=False)])
    whole = pa.StructArray.from_arrays([pa.array([1, 2])], fields=list(inner))
    assert aligned(whole, inner).to_pylist() == [{"a": 1}, {"a": 2}]
    torn = pa.StructArray.from_arrays([pa.array([1, None, None])], fields=list(inner))
    with pytest.raises(BadInputError, match="Row 1, column 'c.a'"):
        aligned(torn, inner)
    masked = pa.StructArray.from_arrays(
        [pa.array([1, None])], fields=list(inner), mask=pa.array([False, True])
    )
    assert aligned(masked, inner).to_pylist() == [{"a": 1}, None]


def test_an_extension_column_is_read_by_its_storage():
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((3, 2), np.float32))
    assert aligned(tensors, pa.list_(pa.float32(), 2)).to_pylist() == [[1, 1]] * 3
    wanted = pa.fixed_shape_tensor(pa.float32(), [2])
    back = aligned(pa.array([[1.0, 1.0]]), wanted)
    assert back.type == wanted and back.storage.to_pylist() == [[1, 1]]


# vectors


@pytest.mark.parametrize("value_type", [pa.float16(), pa.float32(), pa.float64(), pa.int64()])
@pytest.mark.parametrize("layout", [pa.list_, pa.large_list, pa.list_view])
@pytest.mark.parametrize("wanted", [pa.float16(), pa.float32(), pa.float64()])
def test_lists_of_one_length_become_vectors(layout, value_type, wanted):
    array = pa.array([None, [9, 9], [1, 2], None, [3, 4]], layout(value_type))[1:]
    result = aligned(array, pa.list_(wanted, 2))
    assert result.type == pa.list_(wanted, 2)
    assert result.to_pylist() == [[9, 9], [1, 2], None, [3, 4]]


def test_lists_without_nulls_become_vectors_without_a_copy():
    values = np.arange(6, dtype=np.float32)
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), pa.array(values))
    result = aligned(lists, pa.list_(pa.float32(), 2))
    assert result.values.buffers()[1].address == values.ctypes.data


@pytest.mark.parametrize(
    "array",
    [
        pa.array([None, [1.0, 2.0], [3.0], None, [4.0, 5.0, 6.0]])[1:],
        pa.array([[1.0, 2.0], [], None]),
        pa.array([[1.0, 2.0, 3.0], None], pa.list_(pa.float64(), 3)),
        pa.array([[], None]),
    ],
)
def test_wrong_lengths_reach_the_check_for_bad_vectors(array):
    result = aligned(array, pa.list_(pa.float32(), 2))
    assert result.type == pa.list_(pa.float32())
    assert result.to_pylist() == array.to_pylist()
    schema = pa.schema({"c": pa.list_(pa.float32(), 2)})
    kept = align(pa.record_batch({"c": array}), schema)
    filled = handle_bad_vectors(kept, "c", 2, OnBadVectors.FILL, 0.5).column("c")
    assert filled.type == pa.list_(pa.float32(), 2)
    assert filled.to_pylist() == [
        row if row is None or len(row) == 2 else [0.5, 0.5] for row in array.to_pylist()
    ]


def test_overflow_to_half_precision_reaches_the_check_too():
    schema = pa.schema({"c": pa.list_(pa.float16(), 2)})
    given_batch = pa.record_batch({"c": pa.array([[1e6, 0.0], [2.0, 3.0]], pa.list_(pa.float32()))})
    with pytest.raises(BadVectorError, match="row 0 has an infinite element, or one too large"):
        handle_bad_vectors(align(given_batch, schema), "c", 2, OnBadVectors.ERROR)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(
        st.one_of(st.none(), st.lists(st.floats(width=32), min_size=1, max_size=3)), max_size=10
    ),
    start=st.integers(0, 4),
    stop=st.integers(0, 10),
    large=st.booleans(),
)
def test_no_value_changes_on_the_way_to_a_vector_column(rows, start, stop, large):
    kind = pa.large_list if large else pa.list_
    array = pa.array(rows, kind(pa.float64()))[start:stop]
    result = aligned(array, pa.list_(pa.float32(), 2))
    assert str(result.to_pylist()) == str(rows[start:stop])  # str: NaN is equal to itself
    lengths = {len(row) for row in rows[start:stop] if row is not None}
    assert pa.types.is_fixed_size_list(result.type) == (lengths <= {2})


# helpers


@given(rows=st.integers(1, 200), bad=st.lists(st.integers(0, 199), max_size=4))
def test_first_failure_is_the_first(rows, bad):
    def attempt(start, stop):
        if any(start <= i < stop for i in bad):
            raise ValueError

    expected = min((i for i in bad if i < rows), default=None)
    assert first_failure(rows, attempt) == expected


def test_long_values_are_cut():
    assert shorten("a" * 10**6) == "'" + "a" * 56 + "..."
    assert len(shorten([1.5] * 10**6)) <= 60
    assert shorten(math.pi) == repr(math.pi)
