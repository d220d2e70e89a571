"""Steps that are not finite: skipped, counted, and in the end recovered from; and loss spikes, which are logged.

Where the loss, the gradient or the state (weights, averages, moments) of a learner is not finite, its update is
skipped on the device (`Learner.update`), on all workers alike: loss and gradient are sums over workers, and where
the state of one is at fault, its gradient becomes NaN (`GradientSum`). Here the host looks at what every step
returned, one step later, so that it never waits for the device. After IN_A_ROW skipped steps in a row the state is
at fault, not the batch: the learners go back to the last checkpoint, while the clock goes on, past the images that
led here (as in PaLM, arXiv 2204.02311, section 5.1). After ROLLBACKS of these, training stops.

All of this is a function of parameters and data. No checkpoint is written within a row of skipped steps, so a
resumed run meets the whole row again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.training import checkpoint
from pipeline.training.distributed import rank_and_size, sum_over_shards
from pipeline.training.records import notice
from pipeline.training.state import TrainState

IN_A_ROW = 3  # skipped steps, after which the state goes back
ROLLBACKS = 5  # in a run, after which another one stops it
NAMED = 4  # samples in a line; notices.jsonl has all of a batch
Samples = Callable[[int], list[str]]  # ids and digests of the batch that begins at an image


class Readback:
    """Scalars on their way from the device to the host, which may read them later without having to wait."""

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self.names, self.event = list(scalars), None
        values = [scalar.detach().double() for scalar in scalars.values()]
        self.values = torch.stack(values) if values else torch.zeros(0)
        if self.values.is_cuda:
            device = self.values
            self.values = torch.empty(device.shape, dtype=device.dtype, pin_memory=True)
            self.values.copy_(device, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> dict[str, float]:
        """The scalars by name; waits for the device if it has not come that far."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


def skipped(metrics: Mapping[str, float]) -> bool:
    """Whether a step with these metrics was skipped: then a norm of a gradient is not finite (`Learner.update`)."""
    return not all(math.isfinite(value) for name, value in metrics.items() if "gradient_norm" in name)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a value which is not finite, on any worker. All call it together."""
    found = [(~torch.isfinite(tensor)).any() for tensor in tensors.values()]
    counts = sum_over_shards([torch.stack(found).float()]).tolist() if found else []
    return [name for name, count in zip(tensors, counts, strict=True) if count]


@dataclass
class Usual:
    """The usual range of a loss: running mean and mean absolute deviation over some 1 / RATE steps."""

    RATE = 0.02
    FAR = 10.0  # mean absolute deviations; 8 standard deviations of a normal distribution
    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is far above the range, which then takes in its limit instead; or not finite."""
        if not math.isfinite(loss):
            return True
        if self.count == 0:
            self.mean = loss
        limit = self.mean + self.FAR * self.deviation
        spike = self.count * self.RATE >= 1 and loss > limit
        self.count += 1
        rate = max(self.RATE, 1 / self.count)
        away = (limit if spike else loss) - self.mean
        self.mean += rate * away
        self.deviation += rate * (abs(away) - self.deviation)
        return spike


@dataclass
class Faults:
    """The first hook of a run; the others come after what it does to the state.

    checkpoints, notices: folders of the checkpoints, and of notices.jsonl. start: images of the stage before this
    round, added to the clock where it is named. origin: the learners before the first step, as this worker holds
    them, to go back to until there is a checkpoint."""

    checkpoints: Path
    notices: Path
    batch_size: int
    start: int
    samples: Samples
    origin: dict[str, Tensor] = field(default_factory=dict)
    usual: dict[str, Usual] = field(default_factory=dict)
    pending: Readback | None = None
    in_a_row: int = 0

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Look at the step before this one; the device may still be busy with this one."""
        if self.settle(state, state.nimg - 2 * self.batch_size):
            return  # What this step did to the state is undone.
        self.pending = Readback(metrics)

    def settled(self, state: TrainState) -> bool:
        """Look at the last step now; False within a row of skipped steps, where the state is not to be stored."""
        self.settle(state, state.nimg - self.batch_size)
        return self.in_a_row == 0

    def settle(self, state: TrainState, nimg: int) -> bool:
        """Look at the pending step, if any, whose batch began at `nimg`; whether the state went back."""
        if self.pending is None:
            return False
        metrics, self.pending = self.pending.read(), None
        if not skipped(metrics):
            self.in_a_row = 0
            self.name_spikes(nimg, metrics)
            return False
        self.in_a_row += 1
        state.faults[0] += 1
        reasons = [f"{name} {value:g}" for name, value in metrics.items() if not math.isfinite(value)]
        reasons += [f"{name} of the state" for name in not_finite(state.learner_tensors())]
        self.say(nimg, f"a step is skipped, {self.in_a_row} in a row ({', '.join(reasons)})")
        if self.in_a_row < IN_A_ROW:
            return False
        self.roll_back(state, nimg)
        return True

    def roll_back(self, state: TrainState, nimg: int) -> None:
        """Return the learners to the last checkpoint; the clock goes on.

        Raises ConfigError on every worker alike where that has not helped before."""
        found = checkpoint.newest(self.checkpoints)
        if state.faults[1] >= ROLLBACKS or (found < 0 and not self.origin):
            tried = f"after {int(state.faults[1])} returns to earlier states"
            why = tried if state.faults[1] >= ROLLBACKS else "and no checkpoint is left"
            problem = f"{IN_A_ROW} steps in a row are not finite, {why}"
            fix = f"lower the learning rate, or look at the batch: {self.batch(nimg)}"
            raise ConfigError("E-CFG-026", f"training at image {self.start + nimg}", problem, fix)
        stored = checkpoint.path_of(self.checkpoints, found) / "state.safetensors"
        state.restore_learners(state.parts(load_file(stored)) if found >= 0 else self.origin)
        state.faults[1] += 1
        self.in_a_row = 0
        back = max(found, 0)
        count = f"return {int(state.faults[1])} of {ROLLBACKS}"
        lost = f"{state.nimg - back} images are without effect"
        self.say(nimg, f"the state goes back to image {self.start + back}; {lost} ({count})")

    def name_spikes(self, nimg: int, metrics: Mapping[str, float]) -> None:
        """Say which losses are far above their usual range."""
        for name, loss in metrics.items():
            if "loss" in name:
                usual = self.usual.setdefault(name, Usual())
                mean = usual.mean
                if usual.is_spike(loss):
                    self.say(nimg, f"{name} is {loss:.4g}, usually {mean:.4g}")

    def batch(self, nimg: int) -> str:
        """The first samples of the batch that began at `nimg`, in words; notices.jsonl has all."""
        samples = self.samples(nimg)
        more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
        return ", ".join(samples[:NAMED]) + more

    def say(self, nimg: int, text: str) -> None:
        """One line about the batch that began at `nimg`, on the first worker."""
        if rank_and_size()[0] == 0:
            line = f"training at image {self.start + nimg}: {text}; batch: {self.batch(nimg)}"
            notice(self.notices, self.start + nimg, line, {"samples": self.samples(nimg)})
