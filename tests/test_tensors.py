from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from infoprune_export.errors import InputError
from infoprune_export.tensors import TensorFile, described, write_tensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([[1.5]], np.float64),
    "empty": np.empty((0, 4), np.float16),
    "scalar": np.array(7, np.int64),
}


def _same(found, wanted):
    return set(found) == set(wanted) and all(
        found[k].dtype == v.dtype and found[k].shape == v.shape and (found[k] == v).all() for k, v in wanted.items()
    )


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path / "x.safetensors", described(TENSORS), TENSORS.items())
    assert _same(load_file(tmp_path / "x.safetensors"), TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "np"})
    found = TensorFile(tmp_path / "x.safetensors")
    assert _same(found, TENSORS)
    found["b"][0, 0] = 99
    assert found["b"][0, 0] == 99 and _same(TensorFile(tmp_path / "x.safetensors"), TENSORS), "the file keeps what it holds"


def test_views_are_written_as_they_look(tmp_path):
    view = {"t": TENSORS["b"].T}
    write_tensors(tmp_path / "x.safetensors", described(view), view.items())
    assert _same(TensorFile(tmp_path / "x.safetensors"), view)


@pytest.mark.parametrize("given", [{}, {"a": np.zeros(3, np.float32)}, {"b": np.zeros(2, np.float32)}, {"a": np.zeros(2, np.float64)}])
def test_a_tensor_that_is_not_as_described_leaves_no_file(tmp_path, given):
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "x", {"a": (np.dtype(np.float32), (2,))}, given.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [0, 7, 20, -1])
def test_a_damaged_file_is_refused(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    write_tensors(path, described(TENSORS), TENSORS.items())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        TensorFile(path)


def test_an_unknown_type_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(2, np.uint8)}, path)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        TensorFile(path)
