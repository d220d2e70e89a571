"""Everything that training changes, in one object that is saved and loaded as a whole.

A `Learner` is a network with its optimizer and weight averages, all in flat vectors: an update is one sum over
workers, one fused Adam call and one lerp per average, and a checkpoint a handful of tensors. Positions in the data,
random streams and learning rates are functions of `nimg`, so they are not part of the state.

Where the state is sharded (stage 1 of ZeRO, arXiv 1910.02054), each worker has one slice of the moments and
averages, and updates that slice of the weights. What is computed in slices treats every number by itself, so the
bits are the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from pipeline.errors import StorageError
from pipeline.models.layers import MPConv, renormalize_, tangent_gradient_
from pipeline.training.distributed import Slices


def by_memory(p: Tensor) -> Tensor:
    """Kernels [O,I,k,k] as [O,k,k,I], their order in the flat vector (channels_last); other tensors unchanged."""
    return p.permute(0, 2, 3, 1) if p.ndim == 4 else p


def as_memory(flat: Tensor, p: Tensor) -> Tensor:
    """A slice of the flat vector in the shape of p."""
    return flat.view(by_memory(p).shape).permute(0, 3, 1, 2) if p.ndim == 4 else flat.view_as(p)


class Learner:
    """A module whose trainable parameters are views into one flat vector, with Adam and weight averages.

    Filters of one size are adjacent and form one matrix, so a few operations project all of them. `slices` says
    which part of the moments and averages this worker holds: all, unless they are `sharded`."""

    def __init__(
        self,
        module: nn.Module,
        betas: tuple[float, float],
        emas: Mapping[str, Callable[[int, int], float]] = {},  # name -> decay(nimg, batch_size)
        sharded: bool = False,
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
        self.slices = Slices(len(flat), sharded)
        self.own = nn.Parameter(flat[self.slices.own])  # a view, as its gradient is
        self.own.grad = self.grad[self.slices.own]
        self.adam = torch.optim.Adam([self.own], lr=0.0, betas=betas, eps=1e-8, fused=True)
        self.adam.state[self.own] = {
            "step": torch.zeros((), device=flat.device),
            "exp_avg": torch.zeros_like(self.own.data),
            "exp_avg_sq": torch.zeros_like(self.own.data),
        }
        self.decays = dict(emas)
        self.emas = {name: self.own.detach().clone() for name in self.decays}

    @property
    def grad(self) -> Tensor:
        """The flat gradient."""
        assert self.weights.grad is not None
        return self.weights.grad

    @property
    def moments(self) -> dict[str, Tensor]:
        """The state of Adam."""
        return self.adam.state[self.own]

    def whole(self, own: Tensor) -> Tensor:
        """The vector of which `own` is this worker's slice (`Slices.whole`). All workers call it together."""
        return self.slices.whole(own)

    def set_weights(self, own: Tensor) -> None:
        """Set the weights, given this worker's slice of them. All workers call it together."""
        self.own.data.copy_(own)
        self.slices.exchange_(self.weights.data)

    def renormalize_(self) -> None:
        """Project the filters of all `MPConv`; to be called after every change of the weights."""
        for weights, _ in self.filters:
            renormalize_(weights)

    def project_(self) -> None:
        """Remove the radial component from the gradient of the filters of all `MPConv`."""
        for weights, gradient in self.filters:
            tangent_gradient_(gradient, weights)

    def fault(self) -> Tensor:
        """0; or NaN if a value of weights, averages or moments, as far as this worker holds them, is not finite.
        Reads each once, on the device."""
        held = [tensor for tensor in self.tensors().values() if tensor.numel()]
        extremes = [each for tensor in held for each in torch.aminmax(tensor)]
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
        self.slices.exchange_(self.weights.data)
        self.grad.zero_()
        self.renormalize_()
        for name, decay in self.decays.items():
            self.emas[name].lerp_(self.own.detach(), 1 - decay(nimg, batch_size))
        return norm

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """Give the module other weights (such as an average, which is projected) inside the block. On this worker
        alone: `weights` is a whole vector."""
        kept = self.weights.detach().clone()
        self.weights.data.copy_(weights)
        self.renormalize_()
        try:
            yield
        finally:
            self.weights.data.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save. They are references, so copying into them restores the state."""
        adam = {f"adam.{name}": tensor for name, tensor in self.moments.items()}
        return {
            "weights": self.weights.detach(),
            **adam,
            **{f"ema.{name}": tensor for name, tensor in self.emas.items()},
        }

    def layout(self) -> dict[str, Slices]:
        """Of those tensors of which a worker may hold a slice."""
        return {name: self.slices for name in self.tensors() if name not in ("weights", "adam.step")}


@dataclass
class TrainState:
    """The clock, the learners, and further tensors: early weights; in refinement the best state and the guards.

    slices: of those further tensors of which a worker may hold a slice. faults: numbers of skipped steps and of
    returns to a checkpoint (faults.py), int64 [2]."""

    learners: dict[str, Learner]
    nimg: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)
    slices: dict[str, Slices] = field(default_factory=dict)
    faults: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))

    def learner_tensors(self) -> dict[str, Tensor]:
        """The tensors of the learners by name."""
        learners = self.learners.items()
        return {f"{name}.{key}": value for name, own in learners for key, value in own.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as this worker holds them."""
        named = {f"extra.{name}": tensor for name, tensor in self.extra.items()}
        return {"faults": self.faults, **named, **self.learner_tensors()}

    def layout(self) -> dict[str, Slices]:
        """Of those tensors of which a worker may hold a slice, by name."""
        named = {f"extra.{name}": slices for name, slices in self.slices.items()}
        learners = self.learners.items()
        return named | {
            f"{name}.{key}": value for name, own in learners for key, value in own.layout().items()
        }

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, whole, one after the other (`Slices.whole`). All workers go through them together."""
        layout = self.layout()
        for name, own in self.tensors().items():
            yield name, layout[name].whole(own) if name in layout else own

    def parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this worker holds of tensors that are whole."""
        layout = self.layout()
        return {name: each[layout[name].own] if name in layout else each for name, each in whole.items()}

    def restore_learners(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what this worker held of the learners' tensors at an earlier moment of the same run."""
        for name, own in self.learner_tensors().items():
            own.copy_(tensors[name])

    def load(self, tensors: Mapping[str, Tensor], nimg: int, where: str) -> None:
        """Copy saved tensors in, which are whole. Raises StorageError where a name or a shape does not fit."""
        own, layout = self.tensors(), self.layout()
        for name in sorted(own.keys() | tensors.keys()):
            ours = shape(own.get(name), layout.get(name))
            theirs = shape(tensors.get(name))
            if ours != theirs:
                problem = f"tensor {name}: this run has {ours}, the checkpoint {theirs}"
                raise StorageError("E-IO-020", where, problem, "remove the run's folder to start over")
        for name, part in self.parts(tensors).items():
            own[name].copy_(part)
        self.nimg = nimg


def shape(tensor: Tensor | None, slices: Slices | None = None) -> str:
    """The shape of a tensor, or of the whole one of which it is a slice, for an error message."""
    if tensor is None:
        return "nothing"
    return str(tuple(tensor.shape) if slices is None else (slices.length,))
