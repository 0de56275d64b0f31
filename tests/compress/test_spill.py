from __future__ import annotations

import pytest
import torch

from infoprune_export.compress.spill import Spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_spilled_comes_back_bit_for_bit(tmp_path, dtype):
    spill = Spill(tmp_path / "new")
    tensors = [torch.randn(shape).to(dtype) for shape in ((3, 5), (1,), (2, 0, 4))] + [torch.randn(4, 6).to(dtype).T]
    spill.put("group", enumerate(tensors))
    assert spill.has("group")
    for n, tensor in reversed(list(enumerate(tensors))):
        assert torch.equal(spill.get("group", n), tensor)
    assert spill.get("group", 9) is None and spill.get("other", 0) is None
    spill.drop("group")
    spill.drop("group")
    assert not spill.has("group") and not list(spill.directory.iterdir())


def test_a_group_that_was_not_finished_is_not_there(tmp_path):
    spill = Spill(tmp_path)

    def dies():
        yield 0, torch.ones(2)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        spill.put("group", dies())
    assert not spill.has("group") and spill.get("group", 0) is None
    spill.put("group", [(1, torch.ones(3))])
    assert spill.has("group") and spill.get("group", 0) is None
    spill.put("group", [(0, torch.ones(1))])
    assert spill.get("group", 1) is None
