"""What a job makes of its data before any of it reaches the model."""

from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from infoprune_export.application import to_model
from infoprune_export.compress.decide import keep_everything
from infoprune_export.errors import InputError, MissingRequirement, NotEnough
from infoprune_export.job import Job
from infoprune_export.material import Options
from infoprune_export.memory import Memory
from infoprune_export.pipeline import write_plan
from infoprune_export.plans import Plan
from infoprune_export.recipe import DataSource
from infoprune_export.resolution import resolve


class Notes:
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def _job(tmp_path, context, samples=12):
    """The embedded model's job with another context, without its weights."""
    notes = Notes()
    job = Job(resolve("tiny-llava", {"samples": samples}), Options(out=tmp_path / "out", device="cpu"), notes)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=context))
    job.__dict__ |= {"original": SimpleNamespace(config=config), "anatomy": SimpleNamespace(geometry=SimpleNamespace(image_tokens=64))}
    return job, notes.lines


def test_questions_past_the_context_are_left_out_and_told(tmp_path):
    whole = [b.inputs["input_ids"].shape for b in _job(tmp_path, None)[0].batches]
    lengths = [n for rows, n in whole for _ in range(rows)]
    context = sorted(lengths)[len(lengths) // 2]
    fit = sum(n <= context for n in lengths)
    assert 0 < fit < 12
    job, notes = _job(tmp_path, context)
    assert sum(b.samples for b in job.batches) == fit
    assert notes == [f"{12 - fit} of 12 calibration questions are longer than the model's context of {context} tokens and are left out"]


def test_a_context_that_no_question_fits_is_an_error(tmp_path):
    with pytest.raises(InputError, match="longer than the model's context of 60 tokens"):
        _ = _job(tmp_path, 60)[0].batches


def test_no_calibration_data_is_an_error(tmp_path):
    job, _ = _job(tmp_path, None)
    job.recipe = job.recipe.model_copy(update={"calibration": []})
    with pytest.raises(InputError, match="no calibration data"):
        _ = job.batches


@pytest.mark.parametrize(
    ("update", "processes", "missing"),
    [
        ({}, 1, None),  # one process on the CPU trains without either
        ({}, 2, "accelerate"),
        ({"method": "lora"}, 1, "peft"),
    ],
)
def test_what_training_needs_is_asked_for_before_the_work(tmp_path, monkeypatch, update, processes, missing):
    monkeypatch.setattr("infoprune_export.requirements.find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = resolve("tiny-llava", {"train_steps": 5})
    recipe = recipe.model_copy(update={"recovery": recipe.recovery.model_copy(update=update)})
    job = Job(recipe, Options(out=tmp_path / "out", device="cpu"))
    if missing is None:
        job.check_training()
        return
    with pytest.raises(MissingRequirement, match=f"this training needs {missing}") as refused:
        job.check_training()
    assert "infoprune-export[train]" in refused.value.mend
    job.recipe = recipe.model_copy(update={"train_steps": 0})
    job.check_training()


def test_only_data_that_are_read_have_to_be_there(tmp_path):
    job, _ = _job(tmp_path, None)
    absent = [DataSource(path=str(tmp_path / "absent"))]
    job.recipe = job.recipe.model_copy(update={"flops": 1.0, "calibration": absent, "training": absent})
    assert len(job.data_fingerprint()) == len(job.recipe.evaluation)
    for update in ({"flops": 0.5}, {"evaluation": {}}):
        job.recipe = job.recipe.model_copy(update=update)
        with pytest.raises(InputError, match="does not exist"):
            job.data_fingerprint()


def _killed(tmp_path, seed, resumable=True):
    """Whether a run that is killed found what an earlier one had left."""
    options = Options(out=tmp_path / "out", spill=tmp_path / "spill", seed=seed, device="cpu")
    with suppress(KeyboardInterrupt), Job(resolve("tiny-llava", {}), options) as job:
        job.resumable = resumable
        found = (left := job.survey.directory / "left").exists()
        left.mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt
    return found


def test_only_a_run_of_the_same_inputs_takes_over_what_a_killed_one_spilled(tmp_path):
    assert [_killed(tmp_path, seed) for seed in (0, 0, 1)] == [False, True, False]


def test_a_dry_run_leaves_alone_what_a_killed_run_spilled(tmp_path):
    _killed(tmp_path, 0)
    options = Options(out=tmp_path / "out", spill=tmp_path / "spill", device="cpu")
    with Job(resolve("tiny-llava", {}), options) as job:
        assert not job.survey.directory.exists()
    assert _killed(tmp_path, 0)


def test_evaluation_data_have_nothing_to_do_with_a_plan(tmp_path):
    job = Job(resolve("tiny-llava", {}), Options(out=tmp_path / "out", device="cpu"))
    before = job.key(), job.key(evaluated=False)
    assert job.key() != job.key(original=True)
    job.recipe = job.recipe.model_copy(update={"evaluation": {}})
    assert len({*before, job.key()}) == 3
    absent = {"vqa": DataSource(path=str(tmp_path / "absent"))}
    job.recipe = job.recipe.model_copy(update={"evaluation": absent})
    job.key(evaluated=False)
    with pytest.raises(InputError, match="does not exist"):
        job.key()


def test_a_run_that_is_gone_on_from_keeps_its_plan(tmp_path, monkeypatch):
    decided = []

    def decide(job, **choices):
        decided.append(len(decided))
        return keep_everything(job.anatomy, **choices).model_copy(update={"seed": decided[-1]})

    monkeypatch.setattr(Job, "_within_budget", decide)

    def plan(resumable=True):
        job = Job(resolve("tiny-llava", {"flops": 0.5}), Options(out=tmp_path / "out", device="cpu"))
        job.scratch, job.resumable = tmp_path / "scratch", resumable
        return job, job.decide()

    assert [plan()[1].seed for _ in range(2)] == [0, 0]
    job, _ = plan()
    job.clear_spill()
    assert plan()[1].seed == 1
    assert [plan(resumable=False)[1].seed for _ in range(2)] == [2, 3]


def test_a_vision_tower_that_never_runs_cannot_be_what_is_cut(tmp_path):
    recipe = resolve("tiny-llava", {"scope": "vision"})
    recipe = recipe.model_copy(update={"workload": recipe.workload.model_copy(update={"images": 0})})
    with pytest.raises(InputError, match=r"workload\.images is 0") as refused:
        _ = Job(recipe, Options(out=tmp_path / "out", device="cpu")).workload
    assert "--scope language" in refused.value.mend


def test_a_workload_that_names_no_image_tokens_gets_the_models_own(tmp_path):
    assert Job(resolve("tiny-llava", {"flops": 0.5}), Options(out=tmp_path / "out", device="cpu")).workload.image_tokens == 64


@pytest.mark.parametrize("verb", [write_plan, to_model])
def test_plan_and_apply_spill_beside_their_output_and_go_on_from_there(verb, tmp_path, monkeypatch):
    seen = []

    def killed(job):
        seen.append(job.survey.directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "decide", killed)
    with pytest.raises(KeyboardInterrupt):
        verb(resolve("tiny-llava", {}), Options(out=tmp_path / "out", device="cpu"))
    assert seen == [tmp_path / ".out.spill" / "pass1"] and seen[0].parent.is_dir()


@pytest.mark.parametrize("verb", [write_plan, to_model])
def test_plan_and_apply_refuse_what_does_not_fit_before_any_work(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "decide", lambda job: pytest.fail("work was begun"))
    monkeypatch.setattr("infoprune_export.preflight.memory", lambda: Memory(2**20, 2**20))
    with pytest.raises(NotEnough, match="of memory at its peak"):
        verb(resolve("tiny-llava", {}), Options(out=tmp_path / "out", device="cpu"))
    assert not list(tmp_path.iterdir())


def test_a_plan_takes_no_room_for_a_network_and_its_factors_no_calibration(tmp_path, bundle, small_model):
    options = Options(out=tmp_path / "out", device="cpu")
    plan = Job(resolve("tiny-llava", {"flops": 0.5}), options)
    both, alone = (plan.work(network=x).needs(1e11) for x in (True, False))
    assert alone.network == both.network / 2 and alone.spill == both.spill > 0
    made = Job(resolve(str(small_model), {}), replace(options, plan=bundle / "plan.json")).work()
    assert made.samples == 0 and made.kept == Plan.read(bundle / "plan.json").budget.predicted


def test_the_processes_of_a_launch_spill_apart_and_beside_whatever_is_there(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()  # the model itself, say
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ExitStack() as jobs:
        found = set()
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            job = Job(resolve("tiny-llava", {}), Options(out=tmp_path / "build" / "out", spill=tmp_path, device="cpu"))
            found.add(jobs.enter_context(job).survey.directory)
    assert len(found) == 2


def test_a_spill_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(InputError, match="cannot be written") as refused,
        Job(resolve("tiny-llava", {}), Options(out=tmp_path / "out", spill=Path("/proc/nowhere"), device="cpu")) as job,
    ):
        _ = job.survey
    assert refused.value.mend == "choose another --spill"
