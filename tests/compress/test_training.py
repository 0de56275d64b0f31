"""The training loop on a problem with a known answer: resume, guards, shares, the best state."""

import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infoprune_export.compress import training
from infoprune_export.compress.training import PATIENCE_FOR_NAN, Share, Validation, generator, schedule, train
from infoprune_export.errors import InputError

TARGET = torch.tensor([3.0, -2.0, 0.5])


class Regression:
    """Least squares from noisy samples of a linear function; `bad` steps have a loss that is not finite."""

    def __init__(self, bad=(), rate=0.1, kill_at=None, **group):
        self.weights, self.bias = torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True)
        self.bad, self.rate, self.kill_at, self.group = bad, rate, kill_at, group

    def parameter_groups(self):
        return [{"params": [self.weights, self.bias], "lr": self.rate, **self.group}]

    def loss(self, step, share):
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(8, 3, generator=generator(0, step))[share.index :: share.of]
        error = x @ self.weights + self.bias - x @ TARGET - 1
        loss = error.square().mean() * (math.nan if step in self.bad else 1)
        return loss, {"loss": loss.item()}

    def state_dict(self):
        return {"weights": self.weights.detach(), "bias": self.bias.detach()}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.weights.copy_(state["weights"])
        self.bias.copy_(state["bias"])


def trained(steps=60, **options):
    objective = Regression(**{k: options.pop(k) for k in ("bad", "rate", "kill_at") if k in options})
    train(objective, steps=steps, **{"threads": 1, **options})
    return objective


def test_it_finds_the_minimum():
    objective = trained(300)
    torch.testing.assert_close(objective.weights.detach(), TARGET, atol=1e-2, rtol=0)
    torch.testing.assert_close(objective.bias.detach(), torch.tensor(1.0), atol=1e-2, rtol=0)


def test_the_rate_rises_and_falls():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert 0.01 < rates[-1] < 0.02
    assert schedule(0, 1) == 1


def test_the_same_seed_gives_the_same_weights_and_shares_change_only_rounding():
    once, again, shared = trained(), trained(), trained(threads=2)
    assert torch.equal(once.weights, again.weights)
    assert torch.equal(shared.weights, trained(threads=2).weights)
    torch.testing.assert_close(once.weights, shared.weights)


def test_draws_depend_on_seed_step_and_share():
    drawn = {float(torch.rand((), generator=generator(*key))) for key in [(0, 0), (1, 0), (0, 1), (0, 0, Share(0, 2)), (0, 0, Share(1, 2))]}
    assert len(drawn) == 5
    assert float(torch.rand((), generator=generator(0, 3))) == float(torch.rand((), generator=generator(0, 3)))


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    here = Path(__file__)
    script = f"import sys; sys.path.insert(0, {str(here.parent)!r})\nimport {here.stem} as t; from pathlib import Path\n"
    script += f"t.trained(kill_at=37, directory=Path({str(tmp_path)!r}), checkpoint_seconds=0)"
    root = here.parents[2]
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["training.checkpoint"]
    resumed = trained(directory=tmp_path)
    assert torch.equal(resumed.weights, trained().weights)
    # 37 steps were done before the kill: none of them is made again.
    assert torch.load(tmp_path / "training.checkpoint", weights_only=True)["state"]["step"] == 37


def test_a_checkpoint_that_was_being_written_is_not_used(tmp_path):
    (tmp_path / "training.checkpoint.part").write_bytes(b"half of one")
    assert torch.equal(trained(directory=tmp_path).weights, trained().weights)


def test_a_step_without_a_finite_gradient_is_left_out_and_lowers_the_rate():
    assert torch.isfinite(trained(bad=(5,)).weights).all()
    moved = []
    for bad in ((), (0,)):
        objective = Regression(bad=bad, constant=True)
        train(objective, steps=2, threads=1)
        moved.append(objective.weights.detach().abs().max())
    # Adam's first steps are as long as the rate: two of them, or one at half the rate.
    torch.testing.assert_close(torch.stack(moved), torch.tensor([0.2, 0.05]), rtol=0.05, atol=0)


def test_training_without_any_finite_gradient_is_given_up():
    with pytest.raises(InputError, match="no finite gradient for 5 steps in a row"):
        trained(bad=range(10, 10 + PATIENCE_FOR_NAN))
    trained(bad=[x for x in range(60) if x % PATIENCE_FOR_NAN])  # never that many in a row


def test_gradients_are_clipped_group_by_group(monkeypatch):
    objective, seen = Regression(), {}
    groups = [{"params": [objective.bias], "lr": 0.1, "clip": 0.5}, {"params": [objective.weights], "lr": 0.1, "clip": 1e9}]
    monkeypatch.setattr(objective, "parameter_groups", lambda: groups)
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: seen.update(bias=objective.bias.grad.norm(), weights=objective.weights.grad.norm())
    )
    train(objective, steps=1, threads=1)
    assert seen["bias"] <= 0.5 + 1e-6 < seen["weights"]


def test_the_best_state_is_kept_and_patience_ends_training(tmp_path):
    objective, scores = Regression(), iter([0.0, 0.1, 0.9, 0.5, 0.4, 0.8])
    states = []

    def score():
        states.append(objective.weights.detach().clone())
        return next(scores)

    outcome = train(objective, steps=50, threads=1, validation=Validation(score, every=10, patience=2))
    assert len(states) == 5 and outcome.kept == 20
    assert torch.equal(objective.weights.detach(), states[2])


def test_training_that_only_harms_leaves_the_state_as_it_was():
    objective, scores = Regression(), iter([0.9, 0.5, 0.1])
    before = objective.weights.detach().clone()
    train(objective, steps=2, threads=1, validation=Validation(lambda: next(scores), every=1))
    assert torch.equal(objective.weights.detach(), before)


class Well:
    """`(w - bottom)^2` for weights that begin at zero: the best first step is as long as the bottom is far."""

    def __init__(self, bottom, rate=None):
        self.bottom, self.rate, self.w = bottom, rate, torch.zeros(4, requires_grad=True)

    def parameter_groups(self):
        return [{"params": [self.w], "lr": self.rate}]

    def loss(self, step, share):
        loss = (self.w - self.bottom).square().sum()
        return loss, {"loss": loss.item()}

    def state_dict(self):
        return {"w": self.w.detach()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("doublings", [3, 10, 14])
def test_a_rate_is_found_where_none_is_named(doublings, threads):
    first = 1e-7 * 2**doublings  # the next doubling is as far behind the bottom as this one is in front of it, or farther
    for bottom in (first, -first, 0.8 * first, 1.4 * first):
        well = Well(bottom)
        outcome = train(well, steps=1, threads=threads)
        assert outcome.rate == pytest.approx(5 * first)
        # AdamW's first step is as long as the rate, from where the weights were before the search.
        torch.testing.assert_close(well.w.detach(), torch.full((4,), math.copysign(outcome.rate, bottom)), rtol=1e-2, atol=0)
    assert train(Well(first, rate=0.1), steps=1).rate is None


def test_the_boldest_batch_does_not_decide():
    class Wells(Well):
        def loss(self, step, share):
            loss = (self.w - self.bottom * (8, 1, 4)[step % 3]).square().sum()
            return loss, {"loss": loss.item()}

    first = 1e-7 * 2**10
    assert train(Wells(first), steps=3).rate == pytest.approx(5 * first)
    assert train(Wells(first), steps=1).rate == pytest.approx(5 * 8 * first)


def test_half_precision_finds_the_rate_of_full_precision(monkeypatch):
    class Map(Well):
        """A linear map to be found, from one of another that moves the same way everywhere."""

        def __init__(self):
            self.rate, self.w = None, torch.full((32, 32), 0.05, requires_grad=True)
            self.x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 1
            self.y = self.x @ torch.full((32, 32), 0.06)

        def loss(self, step, share):
            loss = ((self.x @ self.w).float() - self.y).square().mean()
            return loss, {"loss": loss.item()}

    class Half(training.OneProcess):
        autocast = staticmethod(lambda: torch.autocast("cpu", torch.bfloat16))

    full = train(Map(), steps=1).rate
    monkeypatch.setattr(training, "OneProcess", Half)
    assert train(Map(), steps=1).rate == full > 1e-3


def test_no_rate_is_found_by_a_loss_that_is_not_finite():
    with pytest.raises(InputError, match="no finite loss to find a rate by"):
        train(Well(math.nan), steps=1)


@pytest.mark.slow
def test_two_processes_of_a_launch_come_to_what_two_threads_come_to(tmp_path):
    here = Path(__file__)
    script = f"import sys; sys.path.insert(0, {str(here.parent)!r})\nimport {here.stem} as t, torch\n"
    script += f"torch.save(t.trained(directory=t.Path({str(tmp_path)!r}), checkpoint_seconds=0).weights, f'{tmp_path}/' + sys.argv[1])"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(here.parents[2]), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    running = [subprocess.Popen([sys.executable, "-c", script, str(i)], env=env) for i, env in enumerate(ranks)]
    assert [p.wait(timeout=300) for p in running] == [0, 0]
    first, second = (torch.load(tmp_path / str(i)) for i in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, trained(threads=2).weights)
