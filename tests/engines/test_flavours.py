from types import SimpleNamespace

import pytest

from infoprune_export.engines import flavours
from infoprune_export.engines.cuda import Gpu
from infoprune_export.errors import InputError, MissingRequirement

RTX = flavours.Flavour(
    "tensorrt-rtx",
    SimpleNamespace(__version__="1.7", ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(["NONE", "CURRENT", "SM86", "SM120"]))),
)
CLASSIC = flavours.Flavour("tensorrt", SimpleNamespace(__version__="11.4"))


@pytest.fixture
def machine(monkeypatch):
    """Says which flavours and GPUs this machine has."""

    def having(*present, archs=()):
        monkeypatch.setattr(flavours, "installed", lambda: present)
        monkeypatch.setattr(flavours, "gpus", lambda: [Gpu("GPU", arch, 1) for arch in archs])

    return having


@pytest.mark.parametrize("text", ["sm86", "SM_86", "86", " 8.6 "])
def test_architectures_in_every_common_spelling(text):
    assert flavours.parse_arch(text) == "sm86"
    assert flavours.parse_arch("sm120") == flavours.parse_arch("12.0") == "sm120"


@pytest.mark.parametrize("text", ["ampere", "", "sm8", "sm8.66", "sm86a"])
def test_what_is_no_architecture(text):
    with pytest.raises(InputError, match="is not a GPU architecture"):
        flavours.parse_arch(text)


def test_the_usual_flavour_follows_the_machine(machine):
    machine(CLASSIC, RTX)
    assert flavours.find_flavour() is RTX
    machine(CLASSIC, RTX, archs=["sm86"])
    assert flavours.find_flavour() is CLASSIC
    assert flavours.find_flavour("tensorrt-rtx") is RTX


def test_flavours_that_are_not_there(machine):
    machine()
    with pytest.raises(MissingRequirement, match=r"infoprune-export\[trt-rtx\]"):
        flavours.find_flavour()
    with pytest.raises(MissingRequirement, match=r"infoprune-export\[trt\]"):
        flavours.find_flavour("tensorrt")
    with pytest.raises(InputError, match="no flavour 'trtllm'"):
        flavours.find_flavour("trtllm")


def test_tensorrt_needs_a_gpu_to_build(machine):
    machine(CLASSIC)
    with pytest.raises(MissingRequirement, match="this machine has none"):
        flavours.find_flavour("tensorrt")


def test_the_flavour_is_one_that_builds_for_all_architectures(machine):
    machine(CLASSIC, RTX, archs=["sm90"])
    assert flavours.flavour_for(["sm90"]) is CLASSIC
    assert flavours.flavour_for(["sm86", "sm120"]) is RTX
    with pytest.raises(MissingRequirement, match=r"tensorrt 11.4 cannot build for sm86"):
        flavours.flavour_for(["sm90", "sm86"])


@pytest.mark.parametrize("arch", ["sm87", "sm90", "sm999"])
def test_architectures_for_the_device_alone_are_named_with_the_way_out(machine, arch):
    machine(RTX)
    with pytest.raises(MissingRequirement) as error:
        flavours.flavour_for(["sm86", arch])
    first, mend = str(error.value).splitlines()
    assert f"cannot build for {arch}" in first and "flavour tensorrt" in first and "sm86, sm120" in first
    assert "infoprune-export[trt]" in mend and "build DIR --target trt" in mend


def test_default_architectures_are_the_gpus_present(machine):
    machine(RTX, archs=["sm89", "sm89", "sm90"])
    assert flavours.default_archs() == ["sm89", "sm90"]
    machine(RTX)
    assert flavours.default_archs() == ["sm80", "sm86", "sm89", "sm120"]
    machine(CLASSIC, RTX, archs=["sm89", "sm90"])
    assert flavours.default_archs() == ["sm89"], "tensorrt builds on the first of them"


def test_a_second_kind_of_gpu_has_to_be_made_the_first(machine):
    machine(CLASSIC, archs=["sm89", "sm90"])
    assert flavours.flavour_for(["sm89"]) is CLASSIC
    with pytest.raises(MissingRequirement, match=r"builds on the first GPU .* for sm89, not for sm90\n.*CUDA_VISIBLE_DEVICES=1"):
        flavours.flavour_for(["sm90"])
