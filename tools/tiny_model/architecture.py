"""The network and its processor: stock Hugging Face classes, no custom code."""

from __future__ import annotations

import llava_processor
import torch
from tiny_data import easy_shapes, scene_questions
from tiny_data.sample import GRID, IMAGE_SIZE, PATCH, stream
from tiny_data.text_images import questions_for
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_TOKENS = GRID * GRID
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
MERGES = 400
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _corpus() -> list[str]:
    """Returns lower-case lines that cover all question forms and answers."""
    lines = ["nswer", "uestion"] * 500
    for image in easy_shapes.image_ids("train")[:500]:
        for question in easy_shapes.sample("train", image).questions:
            lines.append(f" {question.text} {question.answer}")
    for index in range(1500):
        for question in scene_questions.sample(stream("tokenizer", index)).questions:
            lines.append(f" {question.text} {question.answer}")
        # The answers are upper-case words and must not become merges.
        lines += [f" {question.text}" for question in questions_for(stream(index), "ABC")]
    return lines


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE tokenizer on the question texts.

    No merge joins upper-case letters, so words read from images are spelled
    letter by letter. The only capitals in prompts, those of "Question" and
    "Answer", are joined by three merges of their own.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = byte_level
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False),
    )
    import json

    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    merges += [("Q", "uestion"), ("A", "nswer"), ("\u0120", "Answer")]
    vocab = dict(learned["vocab"])
    for left, right in merges[-3:]:
        vocab[left + right] = len(vocab)

    final = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    final.pre_tokenizer = byte_level
    final.decoder = decoders.ByteLevel()
    final.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, EOS, IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=final,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Returns the processor: bicubic resize to 64x64, rescale, normalise."""
    return llava_processor.make_processor(tokenizer, side=IMAGE_SIZE, patch=PATCH, mean=MEAN, std=STD)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Returns the randomly initialised network."""
    torch.manual_seed(seed)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    for name, value in ids.items():
        setattr(config, name, value)
    model = LlavaForConditionalGeneration(config)
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=12, **ids)
    return model
