"""Vectors between numpy and Arrow, and what becomes of bad ones."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_lance.errors import BadVectorError, SchemaError
from gpu_lance.ingest.vectors import (
    arrow_to_matrix,
    bad_vectors,
    handle_bad_vectors,
    is_vector_type,
    vectors_to_arrow,
)
from gpu_lance.types import OnBadVectors

DTYPES = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
LAYOUTS = {
    "list": pa.list_,
    "large_list": pa.large_list,
    "list_view": pa.list_view,
    "large_list_view": pa.large_list_view,
}
NAN, INF = math.nan, math.inf

elements = st.sampled_from([0.0, -0.0, 1.0, -2.5, NAN, INF, -INF])
vectors = st.one_of(st.none(), st.lists(elements, max_size=4))


def plain_bad(row, ndims, zero_is_bad):
    """The definition, spelled out for one row of Python values."""
    if row is None:
        return False
    if len(row) != ndims or any(x is None or not math.isfinite(x) for x in row):
        return True
    return zero_is_bad and all(x == 0 for x in row)


def fixed(rows, ndims, value_type=None):
    return pa.array(rows, pa.list_(value_type or pa.float32(), ndims))


def batch_of(array, nullable=True):
    fields = [pa.field("id", pa.int64()), pa.field("v", array.type, nullable)]
    return pa.RecordBatch.from_arrays(
        [pa.array(range(len(array))), array], schema=pa.schema(fields)
    )


# bad_vectors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(vectors, max_size=12),
    start=st.integers(0, 5),
    stop=st.integers(0, 12),
    ndims=st.integers(0, 3),
    zero_is_bad=st.booleans(),
)
def test_bad_rows_of_a_list_slice_are_those_of_the_definition(
    layout, dtype, rows, start, stop, ndims, zero_is_bad
):
    array = pa.array(rows, LAYOUTS[layout](DTYPES[dtype]))[start:stop]
    expected = [plain_bad(row, ndims, zero_is_bad) for row in rows[start:stop]]
    assert bad_vectors(array, ndims, zero_is_bad=zero_is_bad).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.one_of(st.none(), st.lists(st.one_of(st.none(), elements), min_size=3, max_size=3)),
        max_size=12,
    ),
    start=st.integers(0, 5),
    stop=st.integers(0, 12),
    ndims=st.integers(2, 3),
    zero_is_bad=st.booleans(),
)
def test_bad_rows_of_a_fixed_slice_are_those_of_the_definition(
    dtype, rows, start, stop, ndims, zero_is_bad
):
    array = fixed(rows, 3, DTYPES[dtype])[start:stop]
    expected = [plain_bad(row, ndims, zero_is_bad) for row in rows[start:stop]]
    assert bad_vectors(array, ndims, zero_is_bad=zero_is_bad).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_under_a_null_row_does_not_count(dtype):
    matrix = np.array([[1, 1], [NAN, INF], [2, 2]], dtype)
    array = vectors_to_arrow(matrix, np.array([True, False, True]), pa.list_(DTYPES[dtype], 2))
    assert np.isnan(np.asarray(array.values)[2])  # the garbage is really there
    assert bad_vectors(array, 2, zero_is_bad=True).tolist() == [False, False, False]
    offsets, values = pa.array([0, 2, 5, 7], pa.int32()), pa.array([1, 1, NAN, INF, 3, 2, 2.0])
    hidden = pa.ListArray.from_arrays(offsets, values, mask=pa.array([False, True, False]))
    assert bad_vectors(hidden, 2).tolist() == [False, False, False]
    assert handle_bad_vectors(batch_of(hidden), "v", 2, OnBadVectors.ERROR).column(
        "v"
    ).to_pylist() == [[1, 1], None, [2, 2]]


def test_the_smallest_and_the_largest_floats_are_good():
    for dtype in (np.float16, np.float32, np.float64):
        info = np.finfo(dtype)
        matrix = np.array([[info.max, info.min], [info.smallest_subnormal, 0]], dtype)
        array = vectors_to_arrow(matrix, None, pa.list_(DTYPES[np.dtype(dtype).name], 2))
        assert not bad_vectors(array, 2, zero_is_bad=True).any()


def test_integer_vectors_are_bad_only_for_length_zeros_and_null_elements():
    array = pa.array([[1, 2], [3], [0, 0], None, [4, None]], pa.list_(pa.uint8()))
    assert bad_vectors(array, 2).tolist() == [False, True, False, False, True]
    assert bad_vectors(array, 2, zero_is_bad=True).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("array", [pa.array(["a"]), pa.array([["a"]]), pa.nulls(2)])
def test_something_else_than_vectors_is_refused(array):
    with pytest.raises(SchemaError, match="lists of numbers"):
        bad_vectors(array, 2)


# handle_bad_vectors

ROWS = [[1.0, 2.0], [NAN, 0.0], None, [3.0], [0.0, 0.0], [INF, 1.0], [5.0, 6.0]]
BAD = [1, 3, 5]


def test_good_vectors_leave_the_batch_as_it_is():
    batch = batch_of(fixed([[1, 2], None], 2))
    assert handle_bad_vectors(batch, "v", 2, OnBadVectors.ERROR) is batch


def test_error_names_rows_reasons_and_remedy():
    batch = batch_of(pa.array(ROWS, pa.list_(pa.float32())))
    with pytest.raises(BadVectorError) as caught:
        handle_bad_vectors(batch, "v", 2, OnBadVectors.ERROR, 0.0, True, first_row=1000)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "row 1001 has a NaN" in text
    assert "row 1003 has 1 dimensions instead of 2" in text
    assert "row 1004 is all zeros" in text
    assert "row 1005 has an infinite element" in text
    assert "'v'" in text and "on_bad_vectors='drop'" in text
    assert "1000 " not in text and "1002" not in text


def test_error_counts_what_it_does_not_name():
    with pytest.raises(BadVectorError, match="row 4 has a NaN, 95 more"):
        handle_bad_vectors(batch_of(fixed([[NAN]] * 100, 1)), "v", 1, OnBadVectors.ERROR)


def test_error_says_that_an_element_is_null():
    with pytest.raises(BadVectorError, match="row 0 has a null element"):
        handle_bad_vectors(batch_of(fixed([[1, None]], 2)), "v", 2, OnBadVectors.ERROR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1, 3])
def test_each_policy_gives_a_fixed_size_column(dtype, start):
    batch = batch_of(pa.array([None, *ROWS], pa.list_(DTYPES[dtype])))[1 + start :]
    rows = ROWS[start:]
    ids = batch.column("id").to_pylist()
    bad = {i - start for i in BAD}

    def run(policy, fill=0.0):
        result = handle_bad_vectors(batch, "v", 2, policy, fill)
        result.validate(full=True)
        assert result.schema.field("v").type == pa.list_(DTYPES[dtype], 2)
        return result.column("id").to_pylist(), result.column("v").to_pylist()

    keep = [i for i in range(len(rows)) if i not in bad]
    assert run(OnBadVectors.DROP) == ([ids[i] for i in keep], [rows[i] for i in keep])
    filled = [[-1.5, -1.5] if i in bad else row for i, row in enumerate(rows)]
    assert run(OnBadVectors.FILL, -1.5) == (ids, filled)
    nulled = [None if i in bad else row for i, row in enumerate(rows)]
    assert run(OnBadVectors.NULL) == (ids, nulled)


def test_a_fixed_column_of_another_size_is_bad_in_every_row():
    batch = batch_of(fixed([[1, 2, 3], None, [4, 5, 6]], 3))[1:]
    result = handle_bad_vectors(batch, "v", 2, OnBadVectors.FILL, 7.0)
    assert result.column("v").to_pylist() == [None, [7, 7]]
    assert handle_bad_vectors(batch, "v", 2, OnBadVectors.DROP).column("v").to_pylist() == [None]


def test_the_last_row_can_be_dropped():
    result = handle_bad_vectors(batch_of(fixed([[NAN, 1]], 2)), "v", 2, OnBadVectors.DROP)
    assert result.num_rows == 0
    assert result.schema.field("v").type == pa.list_(pa.float32(), 2)


def test_zeros_are_bad_only_where_they_are_said_to_be():
    batch = batch_of(fixed([[0, -0.0], [1, 0]], 2))
    assert handle_bad_vectors(batch, "v", 2, OnBadVectors.DROP) is batch
    dropped = handle_bad_vectors(batch, "v", 2, OnBadVectors.DROP, zero_is_bad=True)
    assert dropped.column("v").to_pylist() == [[1, 0]]


def test_nulls_need_a_column_that_takes_them():
    batch = batch_of(fixed([[NAN, 1]], 2), nullable=False)
    with pytest.raises(BadVectorError, match=r"'v', which takes no nulls.*row 0 has a NaN"):
        handle_bad_vectors(batch, "v", 2, OnBadVectors.NULL)


@pytest.mark.parametrize("fill", [NAN, INF, 1e6, None, "x", [1.0, 2.0]])
def test_a_fill_value_must_fit_the_column(fill):
    batch = batch_of(fixed([[NAN, 1]], 2, pa.float16()))
    with pytest.raises(BadVectorError, match="fill_value"):
        handle_bad_vectors(batch, "v", 2, OnBadVectors.FILL, fill)


def test_metadata_of_the_schema_survives():
    batch = batch_of(pa.array([[1.0], [NAN]])).replace_schema_metadata({"k": "v"})
    for policy in (OnBadVectors.DROP, OnBadVectors.FILL, OnBadVectors.NULL):
        assert handle_bad_vectors(batch, "v", 1, policy).schema.metadata == {b"k": b"v"}


# matrices


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_becomes_a_column_and_back_without_a_copy(dtype):
    matrix = np.arange(12, dtype=dtype).reshape(4, 3)
    array = vectors_to_arrow(matrix, None, pa.list_(DTYPES[dtype], 3))
    array.validate(full=True)
    assert array.values.buffers()[1].address == matrix.ctypes.data
    back, valid = arrow_to_matrix(array)
    assert back.ctypes.data == matrix.ctypes.data
    assert valid.all() and not back.flags.writeable
    sliced, _ = arrow_to_matrix(array[1:3])
    assert sliced.ctypes.data == matrix[1:].ctypes.data
    np.testing.assert_array_equal(sliced, matrix[1:3])
    chunked, _ = arrow_to_matrix(pa.chunked_array([array]))
    assert chunked.ctypes.data == matrix.ctypes.data


def test_a_mask_costs_no_copy_going_in():
    matrix = np.ones((9, 2), np.float32)
    array = vectors_to_arrow(matrix, np.arange(9) % 2 == 0, pa.list_(pa.float32(), 2))
    assert array.values.buffers()[1].address == matrix.ctypes.data
    assert array.null_count == 4


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(0, 20),
    size=st.integers(1, 5),
    dtype=st.sampled_from(sorted(DTYPES)),
    start=st.integers(0, 6),
    stop=st.integers(0, 20),
    seed=st.integers(0, 2**16),
    masked=st.booleans(),
)
def test_round_trip_of_slices_with_nulls(rows, size, dtype, start, stop, seed, masked):
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, size)).astype(dtype)
    valid = random.random(rows) < 0.6 if masked else None
    array = vectors_to_arrow(matrix, valid, pa.list_(DTYPES[dtype], size))
    array.validate(full=True)
    back, present = arrow_to_matrix(array[start:stop])
    expected = np.ones(rows, bool) if valid is None else valid
    np.testing.assert_array_equal(present, expected[start:stop])
    np.testing.assert_array_equal(back[present], matrix[start:stop][expected[start:stop]])
    assert not back[~present].any()
    assert back.dtype == dtype and back.shape[1] == size


def test_chunks_are_joined():
    chunks = pa.chunked_array([fixed([[1, 2]], 2), fixed([None, [3, 4]], 2)[1:]])
    matrix, valid = arrow_to_matrix(chunks)
    assert matrix.tolist() == [[1, 2], [3, 4]] and valid.all()


def test_other_strides_and_dtypes_are_copied_right():
    matrix = np.arange(12, dtype=np.float64).reshape(3, 4)[:, ::2]
    array = vectors_to_arrow(matrix, None, pa.list_(pa.float16(), 2))
    assert array.to_pylist() == matrix.tolist()


def test_too_large_for_half_precision_becomes_bad():
    array = vectors_to_arrow(np.array([[1e9]]), None, pa.list_(pa.float16(), 1))
    assert bad_vectors(array, 1).tolist() == [True]
    with pytest.raises(BadVectorError, match="too large for halffloat"):
        handle_bad_vectors(batch_of(array), "v", 1, OnBadVectors.ERROR)


@pytest.mark.parametrize(
    ("shape", "valid"), [((2, 3), None), ((4,), None), ((2, 2), np.ones(3, bool))]
)
def test_shapes_must_fit(shape, valid):
    with pytest.raises(SchemaError):
        vectors_to_arrow(np.zeros(shape, np.float32), valid, pa.list_(pa.float32(), 2))


def test_a_matrix_needs_a_fixed_size():
    with pytest.raises(SchemaError, match="fixed-size list"):
        arrow_to_matrix(pa.array([[1.0]]))


def test_which_types_are_vectors():
    assert is_vector_type(pa.list_(pa.float64(), 3))
    for other in (pa.list_(pa.float32()), pa.list_(pa.uint8(), 3), pa.float32()):
        assert not is_vector_type(other)
