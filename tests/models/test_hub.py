"""Models from the hub, through the command line, against a hub of our own on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_hub import serve

REPO = "someone/small-llava"
SHARD = "model.safetensors"


@pytest.fixture
def hub(small_model):
    with serve(REPO, small_model) as hub:
        yield hub


@pytest.fixture
def ask(run, hub, tmp_path):
    """Plans without a cut (`--dry-run`), which fetches and loads the model: `ask(code=2, HF_HUB_OFFLINE="1")`."""
    home = tmp_path / "home"

    def call(*args, code=0, **environment):
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "", "HF_HUB_OFFLINE": "", "no_proxy": "*", **environment}
        return run(REPO, "--dry-run", "--out", tmp_path / "out", *args, code=code, **settings)

    return call


def test_a_model_is_fetched_once_and_then_needs_no_network(hub, ask, small_model):
    ask()
    assert hub.sent.count(SHARD) == 1 and "config.json" in hub.sent
    sent = len(hub.sent)
    ask()
    ask(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert len(hub.sent) == sent


def test_offline_without_the_model_in_the_cache(ask):
    assert f"{REPO}: is not in the cache, and HF_HUB_OFFLINE is set" in ask(code=2, HF_HUB_OFFLINE="1").stderr


def test_no_network(ask):
    message = ask(code=2, HF_ENDPOINT="http://127.0.0.1:9").stderr
    assert f"{REPO}: cannot be fetched from the hub" in message and "check the network" in message


def test_the_token_is_sent(hub, ask):
    hub.token = "hf_secret"
    message = ask(code=2).stderr
    assert f"{REPO}: is gated on the hub" in message and "HF_TOKEN" in message
    assert "hf_wrong" not in ask(code=2, HF_TOKEN="hf_wrong").stderr
    ask(HF_TOKEN="hf_secret")


def test_a_broken_download_goes_on_with_the_file_it_broke_at(hub, ask):
    hub.breaks.add(SHARD)
    message = ask(code=2).stderr
    assert f"{REPO}: cannot be fetched from the hub" in message and "run the same command again" in message
    before = list(hub.sent)
    assert before and SHARD not in before
    hub.breaks.clear()
    ask()
    assert sorted(hub.sent) == sorted([*before, SHARD])


def test_a_file_that_is_not_what_the_hub_has(hub, ask, tmp_path):
    hub.swapped.add(SHARD)
    message = ask(code=2).stderr
    assert f"{SHARD}: is not the file that the hub has (sha256 differs)" in message
    blob = Path(message.rpartition("rm ")[2].strip())
    hub.swapped.clear()
    blob.unlink()  # as the message says
    ask()


def test_another_revision_or_repository(run, hub, ask, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {REPO}\nrevision: v9\n")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "", "no_proxy": "*"}
    assert f"{REPO}: has no revision 'v9' on the hub" in run(recipe, "--dry-run", code=2, **settings).stderr
    assert "someone/else: no such repository on the hub" in run("someone/else", "--dry-run", code=2, **settings).stderr


def test_a_name_that_is_none(run, hub, tmp_path):
    message = run("no one/model", "--dry-run", "--out", tmp_path / "out", code=2, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)).stderr
    assert "no one/model: is no name of a repository" in message
