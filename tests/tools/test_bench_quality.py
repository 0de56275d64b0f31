"""The quality benchmark: its arithmetic on made-up rows, its questions against plain generation, and going on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_quality  # noqa: E402
from networks import IMAGE_TOKEN, IMAGE_TOKENS, build, inputs  # noqa: E402
from quality import campaign, outputs, run, work  # noqa: E402
from quality.campaign import BEST_PAIR, Tuned, describe, only, quick_stage, stages  # noqa: E402
from quality.exam import Exam, grow  # noqa: E402
from quality.methods import ABLATIONS, CANDIDATES, METHODS, OURS, PAIRS, SWAPS  # noqa: E402
from quality.rows import Row, RowFile, Task, Versions  # noqa: E402
from quality.summary import Results, checks  # noqa: E402
from quality.versions import code_version, with_imports  # noqa: E402

GOOD, POOR = PAIRS[3].name, PAIRS[0].name


def row(method: str, accuracy: float, *, budget: float = 0.5, seed: int = 0, setting: str = "tiny", steps: int = 0, **more) -> Row:
    """A row of two tasks whose mean is `accuracy`."""
    task = Task(setting, method, budget, seed, steps=steps)
    accuracies = {"a": accuracy - 0.1, "b": accuracy + 0.1}
    return Row(more.pop("key", f"{task}"), task, flops=budget, accuracy=accuracies, n={"a": 10, "b": 20}, **more)


def values(rows, seconds=None) -> dict[str, float]:
    return {c["name"]: c["value"] for c in checks(Results(rows), seconds)}


def test_differences_are_in_points_over_tasks_and_seeds():
    rows = [row("original", 0.9, budget=1.0)]
    rows += [row(OURS.name, a, seed=s, budget=0.6) for s, a in enumerate((0.80, 0.82, 0.84))]
    rows += [row(GOOD, a, seed=s, budget=0.6) for s, a in enumerate((0.70, 0.74, 0.72))]
    rows += [row(POOR, a, seed=s, budget=0.6) for s, a in enumerate((0.79, 0.10, 0.10))]
    found = values(rows)
    # Ours 82, the best pair by its mean 72; differences by seed 10, 8, 12 with standard deviation 2.
    assert found == {
        "tiny.free.0.6.minus_best_baseline": 10.0,
        "tiny.free.0.6.spread": 2.0,
        "tiny.free.0.6.minus_original": -8.0,
    }


def test_every_check_of_the_proof_can_be_there_and_none_else():
    rows = [row("original", 0.9, budget=1.0, setting=s) for s in ("tiny", "smol")]
    for setting, budgets in (("tiny", (0.8, 0.6, 0.5, 0.33)), ("smol", (0.8, 0.6, 0.5))):
        for seed in range(3 if setting == "tiny" else 1):
            rows += [row(m, 0.5, budget=b, seed=seed, setting=setting) for b in budgets for m in (OURS.name, GOOD)]
        rows += [row(m, 0.6, budget=0.33, setting=setting, steps=9) for m in (OURS.name, GOOD)]
    expected = {f"tiny.free.{b}.{x}" for b in (0.8, 0.6, 0.5, 0.33) for x in ("minus_best_baseline", "spread")}
    expected |= {f"smol.free.{b}.minus_best_baseline" for b in (0.8, 0.6, 0.5)}
    expected |= {"tiny.free.0.6.minus_original", "smol.free.0.6.minus_original", "smol.compress_seconds"}
    expected |= {"tiny.trained.0.33.minus_original", "tiny.trained.0.33.minus_best_baseline", "smol.trained.0.33.minus_original"}
    assert set(values(rows, 100.0)) == expected


def test_swaps_and_ablations_are_no_baselines_and_what_failed_has_no_accuracy():
    rows = [row(OURS.name, 0.8), row(POOR, 0.3), row(SWAPS[0].name, 0.99), row(ABLATIONS[0].name, 0.99)]
    rows += [Row("x", Task("tiny", GOOD, 0.5), failed="cannot be reached")]
    assert Results(rows).best_baseline("tiny.free.0.5") == POOR
    assert values(rows) == {"tiny.free.0.5.minus_best_baseline": 50.0}


def test_one_line_says_what_was_measured_or_why_not():
    assert describe(row(GOOD, 0.9)).startswith(f"tiny.free.0.5 {GOOD} seed 0 (test): 0.9000 (a 0.800 b 1.000)")
    assert describe(Row("x", Task("tiny", GOOD, 0.5), failed="cannot be reached")).endswith(": cannot be reached")
    assert describe(Row("x", Task("smol", "ours", 0.6, split=None), seconds={"compress": 91.7})) == "smol.free.0.6 ours seed 0 (time): 92 s"


def test_rows_of_the_validation_split_are_not_reported():
    rows = [replace(row(OURS.name, 0.8), task=Task("tiny", OURS.name, 0.5, split="val")), row(POOR, 0.3)]
    assert values(rows) == {}


def test_methods_are_what_the_proof_names():
    assert [m.name for m in PAIRS] == [
        "random + SVD",
        "magnitude + SVD",
        "Michel + SVD-LLM",
        "Taylor + ASVD",
        "FLAP + SVD-LLM",
        "Wanda-sp + D-Rank",
    ]
    assert len(SWAPS) == 10
    assert OURS.criterion() == type(OURS.criterion())(), "ours is what a recipe gets that says nothing"
    for method in (*SWAPS, *PAIRS, *ABLATIONS, OURS):
        tried = list(method.candidates(0.5))
        assert CANDIDATES == len(tried) == len({str(t) for t in tried}), "every method is tuned over as many candidates"
        assert all(method.criterion(t) for t in tried)


def test_the_stages_hold_every_row_of_the_proof():
    tasks = {s.name: s.tasks for s in stages()}
    assert {(t.method, t.budget, t.seed) for t in tasks["tiny.free"] if t.method != "original"} == {
        (m.name, b, s) for m in (OURS, *PAIRS) for b in (0.8, 0.6, 0.5, 0.33) for s in range(3)
    }
    assert {(t.method, t.budget) for t in tasks["tiny.trained"]} == {
        (m, b) for m in (OURS.name, f"{BEST_PAIR}1", f"{BEST_PAIR}2") for b in (0.5, 0.33)
    }
    assert len({t.steps for t in tasks["tiny.trained"]}) == 1, "equal steps"
    assert {t.budget for t in tasks["smol.free"]} == {1.0, 0.8, 0.6, 0.5}
    swaps = [t for name in tasks if name.startswith("swaps.") for t in tasks[name]]
    assert len(swaps) == len(set(swaps)) == len(SWAPS) * 4 * 3
    assert [s.name for s in only(stages(), ["swaps.l*"])] == ["swaps.low"]
    assert {(t.budget, t.steps) for s in only(stages(), ["tiny.free.0.5"]) for t in s.tasks} == {(0.5, 0)}
    assert {t.budget for t in quick_stage().tasks} == {1.0, 0.6, 0.33}


class Named:
    """Stands for `Versions`, so that no model is read."""

    def key_of(self, task: Task) -> str:
        return repr(task)


def test_a_run_goes_on_after_it_was_killed(tmp_path):
    path, versions = tmp_path / "rows.jsonl", Named()
    done, torn, missing = (Task("tiny", OURS.name, 0.5, seed, parameters={"head_weight": 2.0}) for seed in range(3))
    RowFile(path).add(Row(versions.key_of(done), done, accuracy={"a": 0.5}))
    with path.open("a") as f:
        f.write('{"key": "half a li')
    book = RowFile(path)
    assert book.missing([done, torn, missing, torn], versions) == [torn, missing]
    assert book.get(versions.key_of(done)).task == done
    book.add(Row(versions.key_of(torn), torn, failed="no"))
    assert RowFile(path).missing([done, torn, missing], versions) == [missing]


def test_earlier_codes_rows_stand_in_where_todays_has_none_and_are_marked(tmp_path):
    book = RowFile(tmp_path / "rows.jsonl")
    before = [row(GOOD, a, seed=s, key=f"earlier {s}", commit="cafe") for s, a in enumerate((0.3, 0.4))]
    before += [
        replace(before[0], key="still earlier", accuracy={"a": 0.0}),
        replace(before[1], key="val", task=replace(before[1].task, split="val")),
    ]
    for x in reversed(before):
        book.add(x)
    today = [row("original", 0.9, budget=1.0), row(GOOD, 0.6), row(OURS.name, 0.7)]
    assert book.earlier(today) == [before[1]]
    outputs.write(tmp_path / "out", today, [], None, [], book.earlier(today))
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"| {GOOD} | 50.00 ± 14.14 † |" in text and "| **ours** | 70.00 |" in text and "† was measured with earlier code" in text
    assert {r["commit"] for r in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]} == {"", "cafe"}


def test_a_row_is_named_by_all_that_it_depends_on(monkeypatch):
    versions = Versions()
    task = Task("tiny", OURS.name, 0.5, parameters={"head_weight": 1.0})
    changed = [
        replace(task, budget=0.6),
        replace(task, seed=1),
        replace(task, split="val"),
        replace(task, steps=10),
        replace(task, images=5),
        replace(task, parameters={"head_weight": 2.0}),
        replace(task, method=POOR, parameters={}),
    ]
    keys = [versions.key_of(t) for t in (task, *changed)]
    assert len(set(keys)) == len(keys)
    assert versions.key_of(replace(task, parameters={})) == keys[0], "a parameter that says what the default says"
    trained = versions.key_of(replace(task, steps=10))
    versions.trained = "other training code"
    assert versions.key_of(task) == keys[0] and versions.key_of(replace(task, steps=10)) != trained
    versions.free = "other code"
    assert versions.key_of(task) != keys[0]
    versions._settings["tiny"] = "other weights"
    assert versions.key_of(Task("tiny", "original", 1.0)) != Versions().key_of(Task("tiny", "original", 1.0))


def test_code_counts_and_layout_does_not(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""A module."""\n\ndef f(x):\n    """Doubles."""\n    return 2 * x\n')
    before = code_version([file])
    file.write_text("# Said differently.\ndef f(x):\n\n    return (2 * x)\n")
    assert code_version([file]) == before
    file.write_text("def f(x):\n    return 3 * x\n")
    assert code_version([file]) != before


def test_imports_are_followed_wherever_they_stand(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.py").write_text("def f():\n    from p.b import g\n    return g\n")
    (tmp_path / "p" / "b.py").write_text("import json\nfrom p import c\ng = c\n")
    (tmp_path / "p" / "c.py").write_text("")
    (tmp_path / "p" / "d.py").write_text("")
    assert {x.name for x in with_imports([tmp_path / "p" / "a.py"], tmp_path)} == {"a.py", "b.py", "c.py"}


def tuned_book(path: Path, scores: dict[str, list[float | None]]) -> Tuned:
    """The first candidates of methods at 0.5 with their accuracies, none for one that failed; the others got nothing right."""
    book, versions = RowFile(path), Named()
    tuned = Tuned(book, versions)
    for method, tried in scores.items():
        for task, score in zip_longest(tuned.tasks("tiny", method, 0.5), tried, fillvalue=0.0):
            book.add(Row(versions.key_of(task), task, **({"failed": "no"} if score is None else {"accuracy": {"a": score}})))
    return tuned


def test_parameters_are_chosen_on_validation(tmp_path):
    tuned = tuned_book(tmp_path / "rows", {OURS.name: [0.5, 0.7, 0.7], POOR: [None, 0.1, 0.2]})
    assert tuned.best("tiny", OURS.name, 0.5) == (list(OURS.candidates(0.5))[1], 0.7)
    assert tuned.filled(Task("tiny", POOR, 0.5, seed=2)).parameters == list(METHODS[POOR].candidates(0.5))[2]
    assert all(t.split == "val" and t.seed == 0 for t in tuned.tasks("tiny", POOR, 0.5))
    with pytest.raises(LookupError, match="not tuned"):
        tuned.best("tiny", GOOD, 0.5)


def test_the_pairs_that_are_trained_are_chosen_on_validation_too(tmp_path):
    scores = {m.name: [0.1 * i] for i, m in enumerate(PAIRS)}
    tuned = tuned_book(tmp_path / "rows", scores)
    first, second = (tuned.filled(Task("tiny", f"{BEST_PAIR}{i}", 0.5, steps=5)) for i in (1, 2))
    assert (first.method, second.method) == (PAIRS[5].name, PAIRS[4].name)
    assert {t.method for t in tuned.needed([Task("tiny", f"{BEST_PAIR}1", 0.5)])} == {m.name for m in PAIRS}


def test_smol_is_tuned_at_one_budget_and_its_choice_carried_over(tmp_path):
    book, versions = RowFile(tmp_path / "rows"), Named()
    tuned = Tuned(book, versions)
    for task, score in zip_longest(tuned.tasks("smol", POOR, 0.8), (0.1, 0.9, 0.2), fillvalue=0.0):
        assert task.budget == 0.6
        book.add(Row(versions.key_of(task), task, accuracy={"a": score}))
    assert tuned.best("smol", POOR, 0.8)[0] == list(METHODS[POOR].candidates(0.8))[1]


def test_a_tree_shares_beginnings_and_nothing_else():
    tree = grow([((7, 8, 1), (2, 3)), ((7, 8, 4), (2, 3)), ((7, 8, 1), (5, 3))])
    # 7 8 | 1 2 | 4 2 | 5: the last tokens are only predicted.
    assert tree.ids.tolist() == [7, 8, 1, 2, 4, 2, 5]
    assert tree.depth.tolist() == [0, 1, 2, 3, 2, 3, 3]
    assert np.flatnonzero(tree.mask[6]).tolist() == [0, 1, 2, 6]
    assert tree.asked.tolist() == [[2, 2, 0], [3, 3, 0], [4, 2, 1], [5, 3, 1], [2, 5, 2], [6, 3, 2]]


def compressed():
    """A random network with uneven heads and low ranks."""
    from infoprune_export.compress.lowrank import LowRankLinear
    from infoprune_export.compress.surgery import prune_heads
    from infoprune_export.models.families import find_anatomy

    model = build()
    anatomy = find_anatomy(model)
    prune_heads(model, anatomy.language.layers[0].attention, [2, 3], [1])
    prune_heads(model, anatomy.vision.layers[1].attention, [0, 3], [0, 3])
    torch.manual_seed(1)
    for layer in (anatomy.language.layers[1], anatomy.vision.layers[0]):
        down = layer.ffn.down
        model.set_submodule(down.path, LowRankLinear(down.d_in, down.d_out, 8, down.bias).requires_grad_(False))
    return model.eval()


@pytest.mark.parametrize("make", [build, compressed])
def test_answers_are_those_of_greedy_generation(make):
    model, images, rng = make(), 5, np.random.default_rng(0)
    pixels = inputs(batch=images)["pixel_values"]
    asked, expected = [], []
    for i in range(images):
        paths = []
        for question in range(4):
            prompt = np.concatenate([[IMAGE_TOKEN] * IMAGE_TOKENS, [5, 6], rng.integers(3, 9, 1 + question % 3)])
            ids = torch.from_numpy(prompt)[None]
            said = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels[i : i + 1],
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
            )[0, len(prompt) :].tolist()
            right = bool(rng.random() < 0.5)
            # A wrong answer goes wrong at a place that is not always the last.
            place = int(rng.integers(3))
            answer = said if right else [t if n != place else (t + 1) % 90 for n, t in enumerate(said)]
            paths.append((prompt, answer))
            expected.append(right)
        asked.append((pixels[i].numpy(), paths))
    assert 2 < sum(expected) < 18
    for size in (1, 3):
        assert Exam(asked, padding=0, images_at_a_time=size).verdicts(model).tolist() == expected


def test_statistics_shared_by_all_methods_give_the_plans_of_their_own(monkeypatch):
    setting = work.SETTINGS["tiny"]
    monkeypatch.setitem(setting.__dict__, "recipe", setting.recipe.model_copy(update={"samples": 6}))
    bench = work.Bench("tiny")
    for method in (OURS, PAIRS[2], PAIRS[3]):  # moments and drawn labels; gates of units; gradients of weights and scales
        job = bench.job_for(Task("tiny", method.name, 0.5, parameters=next(method.candidates(0.5))))
        shared = job.decide()
        del job.__dict__["findings"], job.__dict__["survey"]
        assert job.decide() == shared, method.name


def test_a_row_never_gets_the_name_of_another_model(monkeypatch):
    bench = work.Bench("tiny")
    monkeypatch.setattr(work, "bench", lambda setting, device: bench)
    task = Task("tiny", "original", 1.0, images=1)
    assert work.measure(task, Versions().key_of(task)).n["gqa"] == 3
    with pytest.raises(RuntimeError, match="changed while this ran"):
        work.measure(task, "key of the model that was there when the run began")


def test_outputs_name_best_baseline_and_what_was_tuned(tmp_path):
    rows = [row("original", 0.9, budget=1.0)]
    rows += [row(m, a, budget=b, seed=s) for m, a in ((OURS.name, 0.8), (GOOD, 0.6)) for b in (0.5, 0.6) for s in range(2)]
    rows += [row(OURS.name, 0.85, steps=10)]
    tuned = [{"setting": "tiny", "method": GOOD, "budget": 0.5, "chosen": {"head_share": 0.5}, "tried": []}]
    outputs.write(tmp_path / "out", rows, tuned, None, ["A note."])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary) == {"commit", "machine", "versions", "checks"}
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"+20.00 ± 0.00 ({GOOD})" in text and "A note." in text and "| **ours** | 80.00 ± 0.00 | 80.00 ± 0.00 |" in text
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 5000
    assert outputs.recorded_parameters(tmp_path / "out" / "results.json") == {("tiny", GOOD, 0.5): {"head_share": 0.5}}
    assert outputs.recorded_parameters(tmp_path / "nothing.json") == {}
    others = [tuned[0] | {"budget": 0.6}]
    outputs.write(tmp_path / "out", rows, others, None, [])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tuned"] == [*others, *tuned], (
        "what was tuned before is not forgotten"
    )


@pytest.mark.slow
def test_a_quick_run_measures_its_checks_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(campaign, "QUICK_IMAGES", 3)
    assert bench_quality.main(["--quick", "--out", str(tmp_path)]) == 0
    names = {c["name"] for c in json.loads((tmp_path / "summary.json").read_text())["checks"]}
    assert names == {"tiny.free.0.6.minus_best_baseline", "tiny.free.0.33.minus_best_baseline", "tiny.free.0.6.minus_original"}
    before = (tmp_path / "rows.jsonl").read_bytes()
    capsys.readouterr()
    assert bench_quality.main(["--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    assert capsys.readouterr().err == "", "nothing is measured twice"


def test_rows_that_are_measured_again_are_held_against_the_recorded_ones(tmp_path, monkeypatch, capsys):
    tasks = [Task("tiny", OURS.name, b) for b in (0.5, 0.6, 0.8)]
    recorded = RowFile(tmp_path / "rows.jsonl")
    for task in tasks:
        recorded.add(Row(Named().key_of(task), task, 0.5, {"a": task.budget}, {"a": 10}, device="a GPU"))
    before = recorded.path.read_bytes()

    class OneIsWorse(campaign.Crew):
        def __init__(self, workers, threads, book, versions, device="cpu"):
            self.book, self.versions, self.broken = book, versions, 0

        def __exit__(self, *error):
            pass

        def measure(self, title, todo):
            for task in todo:
                self.book.add(Row(self.versions.key_of(task), task, 0.5, {"a": min(task.budget, 0.75)}, {"a": 10}))

    monkeypatch.setattr(run, "Crew", OneIsWorse)
    monkeypatch.setattr(run, "Versions", Named)
    monkeypatch.setattr(run, "stages", lambda: [campaign.Stage("tiny.free", tuple(tasks))])
    monkeypatch.setattr(campaign.Tuned, "filled", lambda self, task: task)
    assert bench_quality.main(["--again", "9", "--out", str(tmp_path)]) == 0
    assert "2 of 3 rows, drawn from 3, came to the same accuracies; the furthest is 5.000 points off" in capsys.readouterr().out
    found = json.loads((tmp_path / "again.json").read_text())
    (draw,) = found["draws"]
    assert {r["group"]: (r["recorded"]["accuracy"]["a"], r["again"]["accuracy"]["a"], r["again"]["device"]) for r in draw["rows"]} == {
        f"tiny.free.{b}": (b, min(b, 0.75), "cpu") for b in (0.5, 0.6, 0.8)
    }
    assert recorded.path.read_bytes() == before
    assert bench_quality.main(["--again", "1", "--only", "tiny.free.0.5", "--out", str(tmp_path)]) == 0
    assert [len(d["rows"]) for d in json.loads((tmp_path / "again.json").read_text())["draws"]] == [3, 1]
