import numpy as np
import pytest
from fake_cuda import FakeDriver

from infoprune_export.engines import cuda
from infoprune_export.errors import MissingRequirement, NotEnough


def test_devices_as_the_driver_describes_them():
    driver = cuda.Driver(FakeDriver(limit=1000))
    assert driver.gpus() == [cuda.Gpu("Fake GPU", "sm89", 1000)]
    assert driver.version() == "12.8"


def test_arrays_come_back_as_they_went():
    driver = cuda.Driver(FakeDriver())
    stream, buffer = cuda.Stream(driver), cuda.Buffer(driver)
    sent = np.arange(12, dtype=np.float16).reshape(3, 4)
    received = np.empty_like(sent)
    buffer.upload(sent, stream)
    buffer.download(received, stream)
    stream.wait()
    np.testing.assert_array_equal(received, sent)


def test_buffers_grow_when_needed_and_free_what_they_held():
    library = FakeDriver()
    buffer = cuda.Buffer(cuda.Driver(library))
    buffer.reserve(0)
    assert buffer.address, "an empty tensor needs an address too"
    buffer.reserve(100)
    address = buffer.address
    buffer.reserve(50)
    assert buffer.address == address
    buffer.reserve(101)
    address = buffer.address
    buffer.reserve(150)
    assert buffer.address == address, "it grew by half"
    assert len(library.blocks) == 1
    del buffer
    assert not library.blocks


def test_a_full_device_and_a_refusal_are_named():
    library = FakeDriver(limit=10)
    driver = cuda.Driver(library)
    with pytest.raises(NotEnough, match="no memory left"):
        cuda.Buffer(driver).reserve(11)
    library.broken.add("cuStreamSynchronize")
    with pytest.raises(MissingRequirement, match=r"cuStreamSynchronize \(CUDA_ERROR_NOT_PERMITTED\)"):
        cuda.Stream(driver).wait()
