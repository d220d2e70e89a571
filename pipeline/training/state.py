"""Everything that training changes, in one object that is saved and loaded whole.

A `Learner` is a network with its optimizer and weight averages, all held in flat vectors: one all-reduce,
one fused Adam call and one lerp an update, and a checkpoint of a handful of tensors. Positions in the data,
random streams and learning rates are functions of `nimg`, so they are not part of the state.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.errors import StorageError
from pipeline.models.layers import renormalize_, tangent_gradient_


class Learner:
    """A module whose trainable parameters are views into one flat vector, with Adam and weight averages."""

    def __init__(
        self,
        module: nn.Module,
        betas: tuple[float, float],
        emas: Mapping[str, Callable[[int, int], float]] = {},  # name -> decay(nimg, batch_size)
    ) -> None:
        self.module = module
        renormalize_(module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.weights = nn.Parameter(flat)
        self.weights.grad = torch.zeros_like(flat)
        start = 0
        for p in parameters:
            stop = start + p.numel()
            p.data = self.weights.data[start:stop].view_as(p)
            p.grad = self.weights.grad[start:stop].view_as(p)
            start = stop
        self.adam = torch.optim.Adam([self.weights], lr=0.0, betas=betas, eps=1e-8, fused=True)
        self.adam.state[self.weights] = {
            "step": torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        self.decays = dict(emas)
        self.emas = {name: flat.clone() for name in self.decays}

    @property
    def grad(self) -> Tensor:
        """The flat gradient."""
        assert self.weights.grad is not None
        return self.weights.grad

    def update(self, lr: float, nimg: int, batch_size: int) -> None:
        """One Adam step from the accumulated gradient (projected), then the projection of the weights and the
        averages; clears the gradient."""
        tangent_gradient_(self.module)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.grad.zero_()
        renormalize_(self.module)
        for name, decay in self.decays.items():
            self.emas[name].lerp_(self.weights.detach(), 1 - decay(nimg, batch_size))

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """Lend the module other weights (an average, which is projected) for a while."""
        kept = self.weights.detach().clone()
        self.weights.data.copy_(weights)
        renormalize_(self.module)
        try:
            yield
        finally:
            self.weights.data.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save; live references, so that copying into them restores the state."""
        adam = {f"adam.{name}": tensor for name, tensor in self.adam.state[self.weights].items()}
        return {
            "weights": self.weights.detach(),
            **adam,
            **{f"ema.{name}": tensor for name, tensor in self.emas.items()},
        }


@dataclass
class TrainState:
    """The clock, the learners, and further tensors a step keeps (for refinement: best state and guards)."""

    learners: dict[str, Learner]
    nimg: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named = {f"extra.{name}": tensor for name, tensor in self.extra.items()}
        for name, learner in self.learners.items():
            named |= {f"{name}.{key}": tensor for key, tensor in learner.tensors().items()}
        return named

    def load(self, tensors: Mapping[str, Tensor], nimg: int, where: str) -> None:
        """Copy saved tensors in. Raises StorageError where a name or a shape does not fit."""
        own = self.tensors()
        for name in sorted(own.keys() | tensors.keys()):
            ours, theirs = own.get(name), tensors.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                problem = f"tensor {name}: this run has {shape(ours)}, the checkpoint {shape(theirs)}"
                raise StorageError("E-IO-020", where, problem, "remove the run's folder to start anew")
            ours.copy_(theirs)
        self.nimg = nimg


def shape(tensor: Tensor | None) -> str:
    """Shape for an error message."""
    return "nothing" if tensor is None else str(tuple(tensor.shape))
