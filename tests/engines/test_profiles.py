import pytest

from infoprune_export.engines.profiles import Profile, Span, capacity, spanning, workload_profiles
from infoprune_export.errors import InputError
from infoprune_export.recipe import Workload

WORKLOAD = Workload(batch=2, images=1, image_tokens=64, text_tokens=16, new_tokens=8)


def test_capacity_holds_prompt_and_answer_in_whole_tiles():
    assert capacity(WORKLOAD) == 128
    assert capacity(Workload(image_tokens=576, text_tokens=63, new_tokens=1)) == 640
    assert capacity(Workload(image_tokens=576, text_tokens=64, new_tokens=1)) == 704


def test_prefill_and_decode_of_a_decoder():
    prefill, decode = workload_profiles(WORKLOAD)
    assert prefill.shapes("inputs_embeds", (-1, -1, 32)) == ((1, 1, 32), (2, 80, 32), (2, 128, 32))
    assert prefill.shapes("past_key_values.3.key", (-1, 2, -1, 16)) == ((1, 2, 0, 16), (2, 2, 0, 16), (2, 2, 0, 16))
    assert decode.shapes("inputs_embeds", (-1, -1, 32)) == ((1, 1, 32), (2, 1, 32), (2, 1, 32))
    assert decode.shapes("past_key_values.3.key", (-1, 2, -1, 16)) == ((1, 2, 1, 16), (2, 2, 84, 16), (2, 2, 127, 16))


@pytest.mark.parametrize("new_tokens", [1, 2, 16, 300])
def test_every_step_of_the_workload_fits_and_the_mask_is_as_long_as_past_and_sequence(new_tokens):
    workload = WORKLOAD.model_copy(update={"new_tokens": new_tokens})
    for profile in workload_profiles(workload):
        for part in ("minimum", "optimum", "maximum"):
            spans = [getattr(profile.span(axis), part) for axis in ("past", "sequence", "total")]
            assert spans[0] + spans[1] == spans[2] <= capacity(workload)
        assert all(s.minimum <= s.optimum <= s.maximum for s in profile.axes.values())
    decode = workload_profiles(workload)[1]
    assert decode.span("past").minimum <= workload.prompt_tokens <= workload.prompt_tokens + new_tokens - 1 <= decode.span("past").maximum


def test_all_images_of_a_batch_go_through_the_vision_encoder_at_once():
    workload = Workload(batch=3, images=2)
    assert workload_profiles(workload)[0].span("images") == Span(1, 6, 6)
    assert workload_profiles(Workload(images=0))[0].span("images") == Span(1, 1, 1)


def test_static_axes_stay_and_unknown_dynamic_ones_are_refused():
    profile = workload_profiles(WORKLOAD)[0]
    assert profile.shapes("pixel_values", (1, 3, 8, 8)) == ((1, 3, 8, 8),) * 3
    with pytest.raises(InputError, match="'pixel_values' has a dynamic axis 2"):
        profile.shapes("pixel_values", (-1, 3, -1, 8))
    with pytest.raises(InputError, match="'surprise'"):
        profile.shapes("surprise", (-1,))


def test_spanning_covers_all_and_is_tuned_for_the_last():
    both = spanning([Profile("a", {"past": Span(0, 0, 0)}), Profile("b", {"past": Span(1, 5, 9)})])
    assert both.span("past") == Span(0, 5, 9)
