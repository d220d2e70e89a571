"""Everything that training changes, in one object that is saved and loaded as a whole.

A `Learner` is a network with its optimizer and weight averages, all in flat vectors: an update is one sum over
workers, one fused Adam call and one lerp per average, and a checkpoint a handful of tensors. Positions in the data,
random streams and learning rates are functions of `nimg`, so they are not part of the state.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from pipeline.errors import StorageError
from pipeline.models.layers import MPConv, renormalize_, tangent_gradient_


def by_memory(p: Tensor) -> Tensor:
    """Kernels [O,I,k,k] as [O,k,k,I], their order in the flat vector (channels_last); other tensors unchanged."""
    return p.permute(0, 2, 3, 1) if p.ndim == 4 else p


def as_memory(flat: Tensor, p: Tensor) -> Tensor:
    """A slice of the flat vector in the shape of p."""
    return flat.view(by_memory(p).shape).permute(0, 3, 1, 2) if p.ndim == 4 else flat.view_as(p)


class Learner:
    """A module whose trainable parameters are views into one flat vector, with Adam and weight averages.

    Filters of one size are adjacent and form one matrix, so a few operations project all of them."""

    def __init__(
        self,
        module: nn.Module,
        betas: tuple[float, float],
        emas: Mapping[str, Callable[[int, int], float]] = {},  # name -> decay(nimg, batch_size)
    ) -> None:
        self.module = module
        fan_in = {layer.weight: layer.fan_in for layer in module.modules() if isinstance(layer, MPConv)}
        parameters = [p for p in module.parameters() if p.requires_grad]
        parameters.sort(key=lambda p: -fan_in.get(p, 0))
        flat = torch.cat([by_memory(p.detach()).reshape(-1) for p in parameters])
        self.weights = nn.Parameter(flat)
        self.weights.grad = torch.zeros_like(flat)
        start = 0
        for p in parameters:
            place = slice(start, start + p.numel())
            p.data = as_memory(self.weights.data[place], p)
            p.grad = as_memory(self.weights.grad[place], p)
            start = place.stop
        self.filters, start = [], 0  # (weights, gradient), views [N, fan_in] of all filters of one size
        for size, alike in groupby(parameters, key=lambda p: fan_in.get(p, 0)):
            place = slice(start, start + sum(p.numel() for p in alike))
            if size:
                self.filters.append((flat[place].view(-1, size), self.grad[place].view(-1, size)))
            start = place.stop
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

    def renormalize_(self) -> None:
        """Project the filters of all `MPConv`; to be called after every change of the weights."""
        for weights, _ in self.filters:
            renormalize_(weights)

    def project_(self) -> None:
        """Remove the radial component from the gradient of the filters of all `MPConv`."""
        for weights, gradient in self.filters:
            tangent_gradient_(gradient, weights)

    def fault(self) -> Tensor:
        """0; or NaN if a value of weights, averages or moments is not finite. Reads each once, on the device."""
        extremes = [each for tensor in self.tensors().values() for each in torch.aminmax(tensor)]
        return (0 * torch.stack(extremes)).sum()

    def update(self, lr: float, nimg: int, batch_size: int, others: Tensor | None = None) -> Tensor:
        """One Adam step from the accumulated gradient, which is projected first; then projects the weights, updates
        the averages and clears the gradient. Returns the norm of the gradient.

        Where that, or one of the `others`, is not finite, Adam does nothing, on the device and without the host
        having to know, and the norm that is returned is not finite. So moments stay finite: an element of 1e20 is
        refused, whose square would not be."""
        norm = torch.linalg.vector_norm(self.grad)
        if others is not None:
            norm = norm + 0 * others.sum()  # 0, or NaN
        setattr(self.adam, "found_inf", (~norm.isfinite()).float())  # noqa: B010 - as torch.amp.GradScaler does
        self.project_()
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.grad.zero_()
        self.renormalize_()
        for name, decay in self.decays.items():
            self.emas[name].lerp_(self.weights.detach(), 1 - decay(nimg, batch_size))
        return norm

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """Give the module other weights (such as an average, which is projected) inside the block."""
        kept = self.weights.detach().clone()
        self.weights.data.copy_(weights)
        self.renormalize_()
        try:
            yield
        finally:
            self.weights.data.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save. They are references, so copying into them restores the state."""
        adam = {f"adam.{name}": tensor for name, tensor in self.adam.state[self.weights].items()}
        return {
            "weights": self.weights.detach(),
            **adam,
            **{f"ema.{name}": tensor for name, tensor in self.emas.items()},
        }


@dataclass
class TrainState:
    """The clock, the learners, and further tensors: early weights; in refinement the best state and the guards.

    faults: numbers of skipped steps and of returns to a checkpoint (faults.py), int64 [2]."""

    learners: dict[str, Learner]
    nimg: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)
    faults: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))

    def learner_tensors(self) -> dict[str, Tensor]:
        """The tensors of the learners by name."""
        learners = self.learners.items()
        return {f"{name}.{key}": value for name, own in learners for key, value in own.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named = {f"extra.{name}": tensor for name, tensor in self.extra.items()}
        return {"faults": self.faults, **named, **self.learner_tensors()}

    def restore_learners(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of the learners in from those of an earlier moment of the same run."""
        for name, own in self.learner_tensors().items():
            own.copy_(tensors[name])

    def load(self, tensors: Mapping[str, Tensor], nimg: int, where: str) -> None:
        """Copy saved tensors in. Raises StorageError where a name or a shape does not fit."""
        own = self.tensors()
        for name in sorted(own.keys() | tensors.keys()):
            ours, theirs = own.get(name), tensors.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                problem = f"tensor {name}: this run has {shape(ours)}, the checkpoint {shape(theirs)}"
                raise StorageError("E-IO-020", where, problem, "remove the run's folder to start over")
            ours.copy_(theirs)
        self.nimg = nimg


def shape(tensor: Tensor | None) -> str:
    """A tensor's shape, for an error message."""
    return "nothing" if tensor is None else str(tuple(tensor.shape))
