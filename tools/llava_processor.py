"""The processor and the prompt of the models that this project trained."""

from __future__ import annotations

from transformers import LlavaProcessor, PreTrainedTokenizerFast

# One user turn becomes "<image>\nQuestion: {text} Answer:", an assistant turn
# " {text}" and the end token. Content may be a plain string or a list of typed parts.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] "
    "if message['content'] is string else message['content'] -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- for part in parts -%}{{ ' ' + part['text'] }}{%- endfor -%}{{ 'END' }}"
    "{%- else -%}"
    "{%- for part in parts if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for part in parts if part['type'] == 'text' -%}"
    "{{ '\nQuestion: ' + part['text'] + ' Answer:' }}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}"
)
Channels = tuple[float, float, float]


def make_processor(tokenizer: PreTrainedTokenizerFast, *, side: int, patch: int, mean: Channels, std: Channels) -> LlavaProcessor:
    """Returns a processor: bicubic resize to `side` x `side` pixels, rescale, normalise.

    Args:
        tokenizer: Has an image token and an end token.
        side: Height and width of the vision tower's images.
        patch: Height and width of its patches.
        mean: Of each channel, taken off.
        std: Of each channel, divided by.
    """
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Images
    except ImportError:
        from transformers import CLIPImageProcessor as Images
    square = {"height": side, "width": side}
    images = Images(
        do_resize=True,
        size=square,
        resample=3,
        do_center_crop=False,
        crop_size=square,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        image_token=tokenizer.image_token,
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE.replace("END", tokenizer.eos_token),
    )
