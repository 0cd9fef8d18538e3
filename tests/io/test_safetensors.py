"""Safetensors files are those of the safetensors library, and broken ones are told at once."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_jax.io.files.safetensors import SafetensorsFile, TensorStream, write_safetensors

DTYPES = [
    *("bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32"),
    *("float64", "int64", "uint64", "complex64"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu),
]
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def drawn(dtype, *shape):
    return (
        np.random.default_rng(shape).integers(1, 2 if dtype == "bool" else 9, shape).astype(dtype)
    )


def every_dtype():
    return {
        f"{name}.{np.dtype(dtype).name}": drawn(dtype, *shape)
        for dtype in DTYPES
        for name, shape in (("b", (3, 5)), ("a.é", ()), ('"c"\n', (2, 0)), ("Z", (7,)))
    }


def header_of(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start=0, stop=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def assert_refused(path, data, match=None):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


# --- What is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"é": 'a "b"\t\x01\n\x7f'}])
def test_bytes_are_those_of_the_library(tmp_path, metadata):
    tensors = every_dtype()
    write_safetensors(tmp_path / "ours", tensors, metadata)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_no_tensors_at_all(tmp_path):
    write_safetensors(tmp_path / "ours", {})
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save({})
    with SafetensorsFile(tmp_path / "ours") as file:
        assert file.names == ()
        assert file.metadata == {}


@quick
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from([dtype for dtype in DTYPES if dtype != "complex64"]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    )
)
def test_any_names_dtypes_and_shapes(tmp_path, drawn_tensors):
    tensors = {name: drawn(dtype, *shape) for name, (dtype, shape) in drawn_tensors.items()}
    write_safetensors(tmp_path / "ours", tensors)
    data = (tmp_path / "ours").read_bytes()
    assert data == safetensors.numpy.save(tensors)
    with SafetensorsFile(tmp_path / "ours") as file:
        assert sorted(file.names) == sorted(tensors)
        for name, tensor in tensors.items():
            assert file.read(name).tobytes() == tensor.tobytes()
            assert (file.shape(name), file.dtype(name)) == (tensor.shape, tensor.dtype)
            assert file.nbytes(name) == tensor.nbytes


def test_tensors_are_streamed_in_chunks(tmp_path):
    """Of which one is held at a time; the file is that of the whole arrays."""
    rows, chunks = 400, 50
    whole = {f"t{i}": np.full((rows, 1000), i, np.float32) for i in range(4)}

    def stream(i):
        def make():
            for _ in range(chunks):
                yield np.full((rows // chunks, 1000), i, np.float32)

        return TensorStream(np.float32, (rows, 1000), make)

    streams = {f"t{i}": stream(i) for i in range(4)}
    tracemalloc.start()
    write_safetensors(tmp_path / "ours", streams)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole["t0"].nbytes / 4
    assert (tmp_path / "ours").read_bytes() == safetensors.numpy.save(whole)


@pytest.mark.parametrize("dtype", [">f4", "<f4"])
def test_order_of_bytes_and_of_axes(tmp_path, dtype):
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4).transpose(2, 0, 1)
    write_safetensors(tmp_path / "ours", {"x": array})
    with SafetensorsFile(tmp_path / "ours") as file:
        np.testing.assert_array_equal(file.read("x"), array)


def failing():
    yield np.zeros(2, np.float32)
    raise RuntimeError("the disk burns")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        ((np.float32, (4,), failing), "the disk burns"),
        ((np.float32, (4,), lambda: [np.zeros(3, np.float32)]), "ends 4 bytes early"),
        ((np.float32, (4,), lambda: [np.zeros(5, np.float32)]), "4 bytes too long"),
        ((np.float32, (4,), lambda: [np.zeros(4, np.int32)]), "announced as float32"),
        (np.zeros(2, object), "dtype object"),
        (np.zeros(2, np.complex128), "complex128"),
        (np.zeros(2, "U3"), "do not hold"),
    ],
)
def test_a_failure_leaves_the_old_file(tmp_path, tensor, match):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"old": np.ones(3, np.float32)})
    old = path.read_bytes()
    with pytest.raises((ValueError, RuntimeError), match=match):
        write_safetensors(path, {"a": np.zeros(3, np.int64), "b": tensor})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


def test_a_failure_to_replace_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"old": np.ones(3, np.float32)})
    old = path.read_bytes()

    def burn(*_):
        raise OSError("the disk burns")

    monkeypatch.setattr(os, "replace", burn)
    with pytest.raises(OSError, match="burns"):
        write_safetensors(path, {"new": np.ones(3, np.float32)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        ({"__metadata__": np.zeros(1)}, None, "cannot be named"),
        ({3: np.zeros(1)}, None, "cannot be named"),
        ({"\ud800": np.zeros(1)}, None, "surrogate"),
        ({"a": np.zeros(1)}, {"a": 1}, "texts"),
    ],
)
def test_what_the_format_does_not_hold(tmp_path, tensors, metadata, match):
    with pytest.raises(ValueError, match=match):
        write_safetensors(tmp_path / "file", tensors, metadata)
    assert not os.listdir(tmp_path)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no directory"):
        write_safetensors(tmp_path / "missing" / "file", {"a": np.zeros(1)})


# --- What is read --------------------------------------------------------------------------------


def test_files_of_the_library_are_read(tmp_path):
    tensors, metadata = every_dtype(), {"format": "pt", "other": "é"}
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", metadata)
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert file.metadata == metadata
        for name, tensor in tensors.items():
            read = file.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.tobytes() == tensor.tobytes()
            if tensor.ndim:
                for start, stop in ((0, 0), (0, 1), (1, len(tensor)), (0, len(tensor))):
                    rows = file.read_rows(name, start, stop)
                    assert rows.tobytes() == tensor[start:stop].tobytes()
                    assert rows.shape == tensor[start:stop].shape


def test_rows_and_names_that_are_not_there(tmp_path):
    write_safetensors(tmp_path / "file", {"weight": np.zeros((3, 2)), "number": np.zeros(())})
    with SafetensorsFile(tmp_path / "file") as file:
        for start, stop in ((-1, 2), (2, 1), (0, 4)):
            with pytest.raises(ValueError, match="has no rows"):
                file.read_rows("weight", start, stop)
        with pytest.raises(ValueError, match="has no rows"):
            file.read_rows("number", 0, 1)
        with pytest.raises(ValueError, match=r"no tensor 'weights'.*'weight'"):
            file.read("weights")


def test_reading_holds_what_is_asked_for(tmp_path):
    """And neither the file nor a map of it."""
    write_safetensors(tmp_path / "file", {"x": np.zeros((1000, 1000), np.float32)})
    tracemalloc.start()
    with SafetensorsFile(tmp_path / "file") as file:
        file.read_rows("x", 10, 20)
        few = tracemalloc.get_traced_memory()[1]
        file.read("x")
        all_of_it = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert few < 200_000
    assert all_of_it < 4_300_000


def test_a_file_that_becomes_shorter(tmp_path):
    write_safetensors(tmp_path / "file", {"x": np.zeros(1000, np.float32)})
    with SafetensorsFile(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", 500)
        with pytest.raises(ValueError, match="truncated"):
            file.read("x")


# --- What is refused -----------------------------------------------------------------------------

GOOD = {"a": entry(0, 4), "b": entry(4, 12, shape=(2,))}
DATA = bytes(12)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(0, 4), "b": entry(0, 8, shape=(2,))}, "overlap"),
        ({"a": entry(0, 8, shape=(2,)), "b": entry(4, 12, shape=(2,))}, "overlap"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, "holes"),
        ({"a": entry(4, 8)}, "holes"),
        ({"a": entry(0, 4)}, "appended"),
        ({"a": entry(0, 16, shape=(4,))}, "truncated"),
        ({"a": entry(0, 12)}, "data_offsets"),
        ({"a": entry(12, 0, shape=(3,))}, "data_offsets"),
        ({"a": entry(-4, 0)}, "data_offsets"),
        ({"a": entry(0, 12, shape=(-1, -3))}, "no list of lengths"),
        ({"a": entry(0, 12, shape=(3.0,))}, "no integer"),
        ({"a": entry(0, 12, shape=(True, 3))}, "no list of lengths"),
        ({"a": entry(0, 0, shape=(0, 2**62, 2**62))}, "larger than an array"),
        ({"a": entry(0, 2**66, shape=(2**64,))}, "larger than an array"),
        ({"a": entry(0, 12, shape=(1,) * 99)}, "no list of lengths"),
        ({"a": entry(0, 12, dtype="F4", shape=(3,))}, "dtype 'F4'"),
        ({"a": entry(0, 12, dtype=["F32"], shape=(3,))}, "dtype"),
        ({"a": {**entry(0, 12, shape=(3,)), "more": 1}}, "nothing else"),
        ({"a": {"dtype": "F32"}}, "needs dtype"),
        ({"a": [1]}, "needs dtype"),
        ({"__metadata__": {"a": 1}, **GOOD}, "no object of texts"),
        ({"__metadata__": ["a"], **GOOD}, "no object of texts"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"__metadata__": {"x": "1", "x": "2"}}', "stands twice"),
        (b'{"a": NaN}', "no integer"),
        (b'{"a": 1e400}', "no integer"),
        (b'{"a": ' + b"1" * 5000 + b"}", "header"),
        (b"[]", "no JSON object"),
        (b" {}", "no JSON object"),
        (b"{} {}", "header"),
        (b'{"\xff": 1}', "header"),
        (b'{"a":' * 100_000, "header"),
        (b'{"a":' + b"[" * 200_000, "header"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, match):
    assert_refused(tmp_path / "file", with_header(header, DATA), match)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001])
def test_lengths_of_a_header_that_is_not_there(tmp_path, length):
    assert_refused(tmp_path / "file", length.to_bytes(8, "little") + b"{}", "header")


def test_a_file_that_ends_anywhere(tmp_path):
    data = safetensors.numpy.save({"a": np.arange(3, dtype=np.int16), "b": np.ones((2, 2))})
    for end in range(len(data)):
        assert_refused(tmp_path / "file", data[:end])
    assert_refused(tmp_path / "file", data + b"\0", "appended")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.PKL"])
def test_pickled_files_are_not_read(tmp_path, name):
    assert_refused(tmp_path / name, with_header(GOOD, DATA), "pickled objects.*save_pretrained")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])
def test_pickled_files_of_other_names(tmp_path, start):
    assert_refused(tmp_path / "model.safetensors", start + bytes(range(200, 240)), "pickled")


def test_a_header_as_long_as_a_pickle_starts(tmp_path):
    """640 is 0x280, with which pickles of protocol 2 start."""
    data = with_header(json.dumps(GOOD).encode().ljust(0x280), DATA)
    (tmp_path / "file").write_bytes(data)
    with SafetensorsFile(tmp_path / "file") as file:
        assert file.names == ("a", "b")


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        SafetensorsFile(tmp_path / "missing")
    with pytest.raises(ValueError, match="no regular file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        SafetensorsFile(tmp_path / "pipe")


def test_truth_values_but_0_and_1(tmp_path):
    (tmp_path / "file").write_bytes(with_header({"a": entry(0, 2, "BOOL", (2,))}, b"\1\2"))
    with (
        SafetensorsFile(tmp_path / "file") as file,
        pytest.raises(ValueError, match="truth values"),
    ):
        file.read("a")


@quick
@given(st.data())
def test_flipped_bytes(tmp_path, data):
    """Are refused, or read as the library reads them."""
    good = bytearray(safetensors.numpy.save({"a": np.ones((2, 3), np.float16), "b": np.ones(2)}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(good) - 1))
        good[place] = data.draw(st.integers(0, 255))
    (tmp_path / "file").write_bytes(good)
    try:
        with SafetensorsFile(tmp_path / "file") as file:
            ours = {name: file.read(name).tobytes() for name in file.names}
    except ValueError:
        return
    theirs = dict(safetensors.deserialize(bytes(good)))
    assert ours == {name: bytes(tensor["data"]) for name, tensor in theirs.items()}


JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "BOOL", "U8", "F8_E4M3"]), JUNK),
        "shape": st.one_of(st.lists(st.integers(-1, 5), max_size=3), JUNK),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 64), min_size=2, max_size=2), JUNK),
    }
)


@quick
@given(
    st.dictionaries(st.text(max_size=4), st.one_of(ENTRIES, JUNK), max_size=3),
    st.binary(max_size=64),
)
def test_any_header(tmp_path, header, data):
    (tmp_path / "file").write_bytes(with_header(header, data))
    try:
        with SafetensorsFile(tmp_path / "file") as file:
            total = sum(file.read(name).nbytes for name in file.names)
    except ValueError:
        return
    assert total == len(data)


def test_large_lengths_allocate_nothing(tmp_path):
    """Every tensor claims terabytes."""
    size, count = 2**42, 1000
    header = {str(i): entry(i * size, (i + 1) * size, shape=(size // 4,)) for i in range(count)}
    tracemalloc.start()
    assert_refused(tmp_path / "file", with_header(header, DATA), "truncated")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
