"""The training loop of all stages: step, advance the clock, call the hooks.

A step does one whole update and returns metrics; it must be a function of the state alone, so that a resumed run
repeats an unbroken one.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from pipeline.training.state import TrainState

Step = Callable[[TrainState], dict[str, Tensor]]
Hook = Callable[[TrainState, dict[str, Tensor]], None]


def fit(state: TrainState, step: Step, batch_size: int, num_images: int, hooks: Sequence[Hook]) -> None:
    """Train until `num_images` have been seen, or the tensor extra["finished"], if any, becomes true."""
    finished = state.extra.get("finished")
    while state.nimg < num_images and not (finished is not None and finished.item()):
        metrics = step(state)
        state.nimg += batch_size
        for hook in hooks:
            hook(state, metrics)
