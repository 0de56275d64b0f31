import numpy as np
import pytest
from fake_cuda import FakeDriver, fake_tensorrt

from infoprune_export.engines import cuda, tensorrt_run
from infoprune_export.engines.base import TensorSpec
from infoprune_export.engines.flavours import Flavour
from infoprune_export.engines.tensorrt_run import TensorRTEngine, find_engine, load_engine
from infoprune_export.errors import InputError, MissingRequirement, NotEnough


@pytest.fixture
def trt():
    return fake_tensorrt()


@pytest.fixture
def device(monkeypatch, trt):
    """A machine with a GPU (sm89) and the flavour tensorrt, both in main memory."""
    library = FakeDriver()
    driver = cuda.Driver(library)
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(tensorrt_run, "installed", lambda: (Flavour("tensorrt", trt),))
    return library


@pytest.fixture
def engine_file(tmp_path):
    path = tmp_path / "tensorrt" / "sm89" / "decoder.engine"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine")
    return path


def row(*values):
    return np.array([values], np.float32)


EMPTY = np.zeros((1, 0), np.float32)


def test_without_a_driver_it_says_where_to_run(monkeypatch, engine_file):
    monkeypatch.setattr(cuda, "driver", lambda: None)
    for load in (lambda: load_engine(engine_file), lambda: find_engine(engine_file.parents[2], "decoder")):
        with pytest.raises(MissingRequirement, match=r"no NVIDIA driver here.*\nrun this on the target"):
            load()


def test_an_engine_for_this_gpu_is_found(device, engine_file, tmp_path):
    assert find_engine(tmp_path, "decoder") == engine_file
    with pytest.raises(MissingRequirement, match=r"no vision_encoder engine for this GPU \(Fake GPU, sm89\)"):
        find_engine(tmp_path, "vision_encoder")


def test_an_engine_of_a_flavour_that_is_not_installed(device, tmp_path):
    with pytest.raises(MissingRequirement, match=r"(?s)flavour tensorrt-rtx.*infoprune-export\[trt-rtx\]"):
        load_engine(tmp_path / "tensorrt-rtx" / "sm89" / "decoder.engine")


def test_an_engine_that_tensorrt_does_not_take(device, engine_file, monkeypatch):
    monkeypatch.setattr(tensorrt_run, "installed", lambda: (Flavour("tensorrt", fake_tensorrt(takes=False)),))
    with pytest.raises(InputError, match="does not take this engine"):
        load_engine(engine_file)


def test_an_engine_that_does_not_fit_into_the_gpus_memory(device, engine_file, monkeypatch, trt):
    """TensorRT says so by returning nothing, whether for the engine or for what it runs in."""
    trt.engine.full = True
    with pytest.raises(NotEnough, match=r"decoder.engine: the GPU has no memory left\nend other programs on it"):
        load_engine(engine_file)
    device.limit = engine_file.stat().st_size - 1
    monkeypatch.setattr(tensorrt_run, "installed", lambda: (Flavour("tensorrt", fake_tensorrt(takes=False)),))
    with pytest.raises(NotEnough, match="no memory left"):
        load_engine(engine_file)


def test_inputs_and_outputs(device, engine_file):
    engine = load_engine(engine_file)
    assert isinstance(engine, TensorRTEngine)
    assert engine.inputs == (TensorSpec("x", np.dtype(np.float32), (None, None)), TensorSpec("past", np.dtype(np.float32), (None, None)))
    assert [x.name for x in engine.outputs] == ["present", "total"]


def test_runs_on_arrays_of_growing_size(device, engine_file):
    engine = load_engine(engine_file)
    out = engine.run({"x": row(1, 2), "past": EMPTY})
    np.testing.assert_array_equal(out["present"], row(1, 2))
    out = engine.run({"x": row(1, 2, 3, 4, 5)[:, ::2], "past": EMPTY}, ["total"])
    assert list(out) == ["total"] and out["total"] == 9


def test_a_cache_stays_on_the_device(device, engine_file):
    engine = load_engine(engine_file)
    out = engine.run_on_device({"x": row(1, 2), "past": EMPTY}, ["present"])
    for value in (3, 4):
        assert out["present"].shape == (1, value - 1)
        out = engine.run_on_device({"x": row(value), "past": out["present"]}, ["present"])
    assert out["total"] == 1 + 2 + 3 + 4
    np.testing.assert_array_equal(engine.run({"x": row(5), "past": out["present"]})["present"], row(1, 2, 3, 4, 5))


def test_steps_take_the_memory_of_caches_that_nobody_wants_any_more(device, engine_file):
    engine = load_engine(engine_file)

    def answer():
        out = engine.run_on_device({"x": row(1), "past": EMPTY}, ["present"])
        kept = [out["present"]]
        for value in range(2, 7):
            out = engine.run_on_device({"x": row(value), "past": out["present"]}, ["present"])
        return [*kept, out["present"]]

    caches = answer()
    assert caches[0].buffer is not caches[1].buffer
    np.testing.assert_array_equal(engine.run({"x": row(9), "past": caches[0]})["present"], row(1, 9))
    del caches
    answer()
    allocations = device.allocations
    answer()
    assert device.allocations == allocations


def test_the_cache_of_earlier_steps_is_given_back(device, engine_file):
    engine = load_engine(engine_file)
    out = engine.run_on_device({"x": row(1), "past": EMPTY}, ["present"])
    sizes = []
    for value in range(2, 7):
        out = engine.run_on_device({"x": row(value), "past": out["present"]}, ["present"])
        sizes.append(len(device.blocks))
    assert len(set(sizes)) == 1


def test_the_profile_follows_the_shapes(device, engine_file, trt):
    engine = load_engine(engine_file)
    for x, past in ((row(1, 2), EMPTY), (row(3), row(1, 2)), (row(4), row(1, 2)), (row(1), EMPTY)):
        engine.run({"x": x, "past": past})
    assert trt.engine.context.profiles == [0, 1, 0]


def test_shapes_that_no_profile_covers(device, engine_file):
    engine = load_engine(engine_file)
    with pytest.raises(InputError, match=r"not built for these shapes: x \[1, 9\], past \[1, 0\]"):
        engine.run({"x": np.zeros((1, 9), np.float32), "past": EMPTY})
    with pytest.raises(InputError, match="input 'past' is missing"):
        engine.run({"x": row(1)})


@pytest.fixture
def updating(device, engine_file, monkeypatch):
    """A decoder that updates a cache of 6 tokens in place."""
    monkeypatch.setattr(tensorrt_run, "installed", lambda: (Flavour("tensorrt", fake_tensorrt(updates=True)),))
    return load_engine(engine_file)


def fed(*values, tokens):
    return {"inputs_embeds": row(*values), "attention_mask": np.ones((1, tokens), np.float32)}


def test_a_cache_is_updated_where_it_is(device, updating):
    assert updating.updated == {"present.0.key": "past_key_values.0.key"}
    cache = updating.open_cache(1, 300)
    assert cache.capacity == 6  # the engine's own, whatever is asked
    logits, prompt = cache.run(fed(1, 2, 3, tokens=3), None)
    assert logits.ravel() == 6
    logits, first = cache.run(fed(10, tokens=4), prompt)
    assert logits.ravel() == 16
    logits, second = cache.run(fed(20, tokens=4), prompt)  # the same prompt continued otherwise
    assert logits.ravel() == 26
    logits, _ = cache.run(fed(30, tokens=5), second)
    assert logits.ravel() == 56
    with pytest.raises(InputError, match="another continuation"):
        cache.run(fed(1, tokens=5), first)


def test_two_caches_do_not_share_memory_and_leave_it_to_the_next(device, updating):
    one, other = updating.open_cache(1, 6), updating.open_cache(1, 6)
    _, step = one.run(fed(1, 2, tokens=2), None)
    other.run(fed(5, 6, tokens=2), None)
    logits, _ = one.run(fed(3, tokens=3), step)
    assert logits.ravel() == 6
    allocations = device.allocations
    del one, other
    updating.open_cache(1, 6).run(fed(1, tokens=1), None)
    assert device.allocations == allocations


def test_a_cache_has_the_room_that_its_engine_was_built_for(updating):
    cache = updating.open_cache(1, 6)
    _, step = cache.run(fed(1, 2, 3, 4, 5, 6, tokens=6), None)
    assert cache.larger(6, 14) is None
    with pytest.raises(InputError, match=r"has room for 6 tokens, prompt and answer have 7\n.*a recipe with a larger workload"):
        cache.run(fed(7, tokens=7), step)


def answer(engine, *values):
    """Logits of a prompt of two tokens and of a step for every value."""
    cache = engine.open_cache(1, 6)
    logits, step = cache.run(fed(1, 2, tokens=2), None)
    found = [logits.item()]
    for n, value in enumerate(values, 3):
        logits, step = cache.run(fed(value, tokens=n), step)
        found.append(logits.item())
    return found


def test_steps_that_repeat_each_other_run_as_one_graph(device, updating):
    assert answer(updating, 10, 20, 30, 40) == [3, 13, 33, 63, 103]
    assert (device.stream.recordings, device.launches) == (1, 2)
    assert answer(updating, 50, 60, 70, 80) == [3, 53, 113, 183, 263]  # the prompt between has shapes of its own
    assert (device.stream.recordings, device.launches) == (2, 4)
    assert answer(updating, 5) == [3, 8]  # too short to be worth it
    assert (device.stream.recordings, device.launches) == (2, 4)
    assert not device.graphs


def test_a_prompt_is_no_graph_however_often_it_is_read(device, updating):
    for _ in range(5):
        assert answer(updating) == [3]
    assert not device.stream.recordings


def test_images_are(device, engine_file):
    engine = load_engine(engine_file)
    assert [engine.run({"x": row(n, 1), "past": EMPTY})["total"] for n in range(5)] == [1, 2, 3, 4, 5]
    assert (device.stream.recordings, device.launches) == (1, 3)


def test_an_engine_that_cannot_be_recorded_runs_as_ever(device, updating):
    device.stream.capturable = False
    for _ in range(tensorrt_run.FAILURES + 2):
        assert answer(updating, 10, 20, 30, 40) == [3, 13, 33, 63, 103]
    assert (device.stream.recordings, device.launches) == (tensorrt_run.FAILURES, 0)


def test_one_failure_is_no_reason_to_give_up(device, updating):
    device.stream.capturable = False
    answer(updating, 10, 20, 30, 40)
    device.stream.capturable = True
    assert answer(updating, 10, 20, 30, 40) == [3, 13, 33, 63, 103]
    assert device.launches == 2


@pytest.mark.parametrize("function", ["cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"])
def test_a_driver_that_does_not_record(device, updating, monkeypatch, function):
    monkeypatch.setattr(FakeDriver, function, lambda self, *arguments: 801)
    assert answer(updating, 10, 20, 30, 40) == [3, 13, 33, 63, 103]
    assert not device.launches


def test_tensorrt_rtx_records_by_itself(device, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trt = fake_tensorrt(updates=True)
    monkeypatch.setattr(tensorrt_run, "installed", lambda: (Flavour("tensorrt-rtx", trt),))
    path = tmp_path / "tensorrt-rtx" / "sm89" / "decoder.engine"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine")
    assert answer(load_engine(path), 10, 20, 30, 40) == [3, 13, 33, 63, 103]
    assert trt.engine.config.cuda_graph_strategy == "whole graph" and not device.stream.recordings


def test_the_mask_grows_by_a_tile_at_a_time(updating, monkeypatch):
    monkeypatch.setattr(tensorrt_run, "MASK_STEP", 4)
    lengths = []
    run = updating.run
    monkeypatch.setattr(updating, "run", lambda feeds, outputs: (lengths.append(feeds["attention_mask"].shape[1]), run(feeds, outputs))[1])
    assert answer(updating, 10, 20, 30, 40) == [3, 13, 33, 63, 103]
    assert lengths == [4, 4, 4, 6, 6]  # 6 is the capacity


def test_a_cache_is_zeros_at_first(device, updating, monkeypatch):
    """What lies behind the tokens has the weight 0, and 0 times NaN is NaN."""
    cache = updating.open_cache(1, 6)
    cache.run(fed(1, np.nan, np.nan, tokens=3), None)
    del cache
    assert answer(updating, 10) == [3, 13]


def test_more_rows_than_the_engine_was_built_for(device, updating):
    with pytest.raises(InputError, match=r"not built for these shapes: past_key_values.0.key \[2, 1, 6, 1\]"):
        updating.open_cache(2, 6)
    assert not device.allocations


def test_a_cache_given_as_an_array_comes_back_as_one(updating):
    past = np.array([1, 2, 0, 0, 0, 0], np.float32).reshape(1, 1, 6, 1)
    out = updating.run({**fed(3, tokens=3), "past_key_values.0.key": past})
    np.testing.assert_array_equal(out["present.0.key"].ravel(), [1, 2, 3, 0, 0, 0])
    assert out["logits"].ravel() == 6


def test_an_engine_that_joins_past_and_present_has_no_cache_of_its_own(device, engine_file):
    assert load_engine(engine_file).open_cache(1, 6) is None
