from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infoprune_export.errors import InputError
from infoprune_export.runtime.prompts import Prompts

IMAGE, EOS = 433, 432
QUESTIONS = ["is there a circle?", "", "what does it say?  ", "naïve 😀 naïve", "a </s> in it"]
PICTURE = Image.new("RGB", (20, 30))
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' }}{% for c in m['content'] %}{% generation %}{{ c['text'] + ' ' + eos_token }}{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def prompts(bundle_dir: Path) -> Prompts:
    return Prompts.from_directory(bundle_dir)


@pytest.fixture(scope="session")
def vicuna_dir(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A processor with a Llama-style tokenizer: bytes as a fallback, `▁` for spaces, a beginning token before every text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["is there a red circle in the image?", "USER: what color ASSISTANT: blue yes no"] * 3
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    root = tmp_path_factory.mktemp("vicuna")
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    processor.save_pretrained(root)
    settings = json.loads((root / "tokenizer_config.json").read_text())
    # As LLaVA-1.5 has it on the hub. For this model type transformers takes tokenizer.json as it is, for others it would not.
    (root / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
    text = {"model_type": "llama", "eos_token_id": 2}
    config = {"model_type": "llava", "image_token_index": fast.convert_tokens_to_ids("<image>"), "text_config": text}
    (root / "config.json").write_text(json.dumps(config))
    return root


def processor_of(directory: Path):
    return pytest.importorskip("transformers").AutoProcessor.from_pretrained(directory)


def theirs(processor, question: str, images: int) -> list[int]:
    content = [{"type": "image", "image": PICTURE}] * images + [{"type": "text", "text": question}]
    conversation = [{"role": "user", "content": content}]
    ids = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    return [int(i) for i in (ids[0] if isinstance(ids[0], (list, np.ndarray)) or getattr(ids, "ndim", 1) == 2 else ids)]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("which", ["bundle_dir", "vicuna_dir"])
def test_chat_ids_like_transformers(request: pytest.FixtureRequest, which: str, images: int) -> None:
    directory = request.getfixturevalue(which)
    processor, ours = processor_of(directory), Prompts.from_directory(directory)
    for question in QUESTIONS:
        assert ours.encode(question.strip(), images).tolist() == theirs(processor, question.strip(), images), question


@pytest.mark.parametrize("which", ["bundle_dir", "vicuna_dir"])
def test_raw_ids_like_transformers(request: pytest.FixtureRequest, which: str) -> None:
    directory = request.getfixturevalue(which)
    processor, ours = processor_of(directory), Prompts.from_directory(directory)
    for text, images in (("USER: <image>\nwhat? ASSISTANT:", 1), ("<image>a<image> b", 2), ("no image", 0), ("", 0)):
        expected = processor(text=text, images=[PICTURE] * images or None)["input_ids"][0]
        assert ours.encode(text, images, raw=True).tolist() == [int(i) for i in expected], text


def test_the_beginning_token_comes_once(vicuna_dir: Path) -> None:
    ours = Prompts.from_directory(vicuna_dir)
    assert ours.encode("is it red?", 1).tolist().count(1) == 1
    assert ours.encode("is it red?", raw=True).tolist().count(1) == 1


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}, {"add_eos_token": True}])
def test_flags_beside_a_tokenizer_json_count_for_nothing_as_in_transformers(
    vicuna_dir: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    root = tmp_path / "m"
    shutil.copytree(vicuna_dir, root)
    settings = json.loads((root / "tokenizer_config.json").read_text())
    (root / "tokenizer_config.json").write_text(json.dumps({**settings, **flags}))
    expected = processor_of(root)(text="is it red?")["input_ids"][0]
    assert Prompts.from_directory(root).encode("is it red?", raw=True).tolist() == [int(i) for i in expected]


def test_image_tokens_are_repeated(prompts: Prompts) -> None:
    assert prompts.image_tokens == 64
    ids = prompts.encode("is there a circle?", images=1)
    assert (ids == IMAGE).sum() == 64 and ids.dtype == np.int64
    assert (prompts.encode("is there a circle?", images=1, image_tokens=5) == IMAGE).sum() == 5


@pytest.mark.parametrize("question", ["<image>\nis there a circle?", "<image> is there a circle?", "is there a circle? "])
def test_the_image_token_is_put_in_where_it_is_missing(prompts: Prompts, question: str) -> None:
    assert prompts.render(question, 1).strip() == "<image>\nQuestion: is there a circle? Answer:"


def test_without_a_chat_template(bundle_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle_dir, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    ours = Prompts.from_directory(tmp_path / "m")
    assert ours.render("what?", 1) == "USER: <image>\nwhat? ASSISTANT:"
    assert ours.render("what?", 2) == "USER: <image>\n<image>\nwhat? ASSISTANT:"
    assert ours.render("what?") == "USER: what? ASSISTANT:"
    assert ours.render("<image>\nor\n<image>", 2) == "USER: <image>\nor\n<image> ASSISTANT:"
    own = Prompts.from_directory(tmp_path / "m", "Q: {question} {} A:")
    assert own.render("what?") == "Q: what? {} A:"
    assert own.render("what?", 1) == "Q: <image>\nwhat? {} A:"
    after = Prompts.from_directory(tmp_path / "m", "Q: {question} <image> A:")
    assert after.render("what?", 2) == "Q: what? <image>\n<image> A:"
    assert after.render("is <image> it?", 1) == "Q: is\n<image>\nit?  A:"
    with pytest.raises(InputError, match=r"has no \{question\}"):
        Prompts.from_directory(tmp_path / "m", "Q: {} A:")
    assert own.decode(own.encode_answer("red")) == " red" and own.encode_answer("red")[-1] == EOS


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("several", [False, True])
def test_where_a_chat_template_may_be(bundle_dir: Path, tmp_path: Path, name: str, several: bool) -> None:
    shutil.copytree(bundle_dir, tmp_path / "m")
    template = (tmp_path / "m" / "chat_template.jinja").read_text()
    (tmp_path / "m" / "chat_template.jinja").unlink()
    path = tmp_path / "m" / name
    data = json.loads(path.read_text()) if path.exists() else {}
    source = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}] if several else template
    path.write_text(json.dumps({**data, "chat_template": source}))
    assert Prompts.from_directory(tmp_path / "m").render("what?", 1) == "<image>\nQuestion: what? Answer:"


def with_template(bundle_dir: Path, tmp_path: Path, template: str) -> Prompts:
    shutil.copytree(bundle_dir, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    return Prompts.from_directory(tmp_path / "m")


def test_a_template_for_plain_text(bundle_dir: Path, tmp_path: Path) -> None:
    ours = with_template(bundle_dir, tmp_path, "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}")
    assert ours.render("what?") == "[user] what?"
    assert ours.render("what?", 2) == "[user] <image>\n<image>\nwhat?"
    strict = "{% for m in messages %}{{ 'U: ' + m['content'] }}{% endfor %}"
    assert with_template(bundle_dir, tmp_path / "s", strict).render("what?", 1) == "U: <image>\nwhat?"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "line 1: the chat template is not valid Jinja"),
        ("{{ raise_exception('only system messages') }}", r"refuses this conversation \(only system messages\)"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses this conversation|image tokens"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|refuses"),
        ("fixed text", r"has 0 image tokens \(<image>\) for 1 images"),
    ],
)
def test_templates_that_cannot_be_used(bundle_dir: Path, tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_template(bundle_dir, tmp_path, template).render("what?", 1)


def test_template_functions(bundle_dir: Path, tmp_path: Path) -> None:
    loop = "{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}"
    template = "{{ strftime_now('%Y')|length }}" + loop + "{{ {'a': 'ü<'}|tojson }}{{ bos_token }}"
    assert with_template(bundle_dir, tmp_path, template).render("what?") == '41{"a": "ü<"}<s>'


@pytest.mark.parametrize(("question", "images"), [("<image> and <image>", 1), ("<image>", 0), ("<image>", 2)])
@pytest.mark.parametrize("raw", [False, True])
def test_the_wrong_number_of_images(prompts: Prompts, question: str, images: int, raw: bool) -> None:
    with pytest.raises(InputError, match=rf"image tokens \(<image>\) for {images} images"):
        prompts.encode(question, images, raw=raw)


def test_a_text_model_takes_no_images(bundle_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["image_token_index"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    for template in (True, False):
        if not template:
            (tmp_path / "m" / "chat_template.jinja").unlink()
        ours = Prompts.from_directory(tmp_path / "m")
        assert ours.encode("what?").size
        with pytest.raises(InputError, match="the model takes no images"):
            ours.encode("what?", images=1)


def test_a_prompt_that_is_too_long(prompts: Prompts) -> None:
    with pytest.raises(InputError, match=r"the prompt takes \d+ tokens, the model has 160 positions"):
        prompts.encode("circle " * 200, images=1)


def test_answers(prompts: Prompts, vicuna_dir: Path) -> None:
    assert prompts.eos_ids == (EOS,)
    answer = prompts.encode_answer("triangle")
    assert answer[-1] == EOS and prompts.decode(answer) == " triangle"
    whole = prompts.tokenizer.encode(prompts.render("?") + " triangle</s>").ids
    assert whole[-len(answer) :] == answer.tolist()
    vicuna = Prompts.from_directory(vicuna_dir)
    assert vicuna.eos_ids == (2,)
    assert vicuna.encode_answer("blue")[-1] == 2 and vicuna.decode(vicuna.encode_answer("blue")).strip() == "blue"


@pytest.mark.parametrize("text", [" a triangle", "naïve 😀 and ▁ 語", ""])
@pytest.mark.parametrize("which", ["bundle_dir", "vicuna_dir"])
def test_streamed_text_is_the_whole_text(request: pytest.FixtureRequest, which: str, text: str) -> None:
    ours = Prompts.from_directory(request.getfixturevalue(which))
    ids = ours.encode(text, raw=True).tolist()
    stream = ours.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == ours.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces), "half a character was printed"


def test_half_a_character_is_not_lost_at_the_end(prompts: Prompts) -> None:
    stream = prompts.stream()
    ids = prompts.encode("a😀", raw=True).tolist()
    assert [stream.push(i) for i in ids[:3]] == ["a", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Prompts.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer"):
        Prompts.from_directory(tmp_path)
