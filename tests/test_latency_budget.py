"""`--latency` and `bench --profile-layers` as a user meets them."""

import json

import pytest


@pytest.mark.parametrize("latency", ["0", "1", "1.5", "-0.5", "nan", "half"])
def test_latency_must_be_a_fraction_kept(run, latency):
    assert "--latency" in run("tiny-llava", "--latency", latency, code=2).stderr


@pytest.mark.parametrize("verb", ["export", "plan"])
def test_one_budget_and_not_two(run, verb, tmp_path):
    message = run(verb, "tiny-llava", "--latency", "0.5", "--flops", "0.5", "--out", tmp_path / "out", code=2).stderr
    assert "--flops and --latency are two budgets" in message
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_with_two_budgets_names_its_line(run, tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text("model: package:tiny_llava\nflops: 0.5\nlatency: 0.5\n")
    assert "flops and latency are two budgets: give one" in run(recipe, code=2).stderr


@pytest.mark.parametrize(
    ("line", "words"), [("targets: [trt]", "the only target is trt"), ("criterion: {allocation: uniform}", "fixes shares of FLOPs")]
)
def test_what_cannot_be_allocated_by_time_is_refused(run, tmp_path, small_model, line, words):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(f"model: {small_model}\n{line}\ncalibration: [{{path: 'tiny:vqa', split: train}}]\n")
    message = run("plan", recipe, "--latency", "0.5", "--out", tmp_path / "out", code=2).stderr
    assert words in message
    assert "use --flops" in message


@pytest.fixture(scope="module")
def profiled(run, bundle, tmp_path_factory):
    """The table of the bundle's original, measured in a hurry, and the cache that holds it."""
    cache = tmp_path_factory.mktemp("cache")
    done = run("bench", bundle, "--profile-layers", "--threads", "1", "--seconds", "0.3", "--json", XDG_CACHE_HOME=str(cache))
    return json.loads(done.stdout), cache


def test_layers_are_profiled_into_json_and_a_table(run, bundle, profiled, tmp_path):
    table, cache = profiled
    assert list(table["parts"]) == ["vision", "prefill", "decode"]
    assert table["parts"]["decode"]["passes"] == 3
    assert set(table["parts"]["prefill"]["pairs"]) == {"192x512", "512x192"}
    assert len(list(cache.rglob("*.json"))) == 1
    shown = run("bench", bundle, "--profile-layers", "--threads", "1", "--seconds", "0.1", XDG_CACHE_HOME=str(tmp_path)).stdout
    assert "rank of 192x512" in shown and "groups of 6/3x32 on 192" in shown


def test_only_ort_is_profiled(run, bundle):
    assert "not with trt" in run("bench", bundle, "--profile-layers", "--engine", "trt", code=2).stderr


@pytest.fixture
def small_recipe(tmp_path, small_model):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"model: {small_model}\nworkload: {{text_tokens: 16, new_tokens: 4}}\nsamples: 8\n"
        "calibration: [{path: 'tiny:vqa', split: train}]\n"
    )
    return recipe


def test_a_plan_within_a_time_says_so(run, profiled, small_recipe, tmp_path):
    cache = {"XDG_CACHE_HOME": str(profiled[1])}
    run("plan", small_recipe, "--latency", "0.7", "--threads", "1", "--out", tmp_path / "plan", **cache)
    budget = json.loads((tmp_path / "plan" / "plan.json").read_text())["budget"]
    assert budget["latency"]["requested"] == 0.7
    assert 0 < budget["latency"]["predicted"] < 1
    assert budget["predicted"] < 1
    shown = run("inspect", tmp_path / "plan").stdout
    assert "0.7 of the time asked" in " ".join(shown.split())
    assert len(list(profiled[1].rglob("*.json"))) == 1  # nothing was measured again


def test_a_time_out_of_reach_names_the_least(run, profiled, small_recipe, tmp_path):
    cache = {"XDG_CACHE_HOME": str(profiled[1])}
    out = tmp_path / "plan"
    message = run("plan", small_recipe, "--latency", "0.01", "--threads", "1", "--out", out, code=2, **cache).stderr
    assert "a budget of 0.010 cannot be reached" in message
    assert "ask for --latency 0." in message
    assert not out.exists()


def test_several_processes_do_not_each_plan_for_themselves(run, small_recipe, tmp_path):
    message = run("plan", small_recipe, "--latency", "0.5", "--out", tmp_path / "plan", code=2, WORLD_SIZE="2").stderr
    assert "--latency is decided by one process" in message
