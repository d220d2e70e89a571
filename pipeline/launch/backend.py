"""What Ray Train does for our workers: it starts and watches them, and shows all GPUs of a node to those that are
there, as NCCL wants it. Their process group they make themselves (meeting.py).

Ray's own settings for PyTorch would import torch in the driver and in the controller of a run, which need none: it
takes each 280 MiB and two seconds, one after the other, before the first worker starts.
"""

from __future__ import annotations

from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

# Each makes Ray start a process beside the workers. One hands out data sets of Ray Data, of which there are none.
# The other frees what a dead controller held, with which a private Ray ends anyway; at the end of a short run it
# waits 12 seconds for a dashboard, which a private Ray does not have.
UNNEEDED = ("DatasetsCallback", "PlacementGroupCleanerCallback")


class PrivateTrainer(DataParallelTrainer):
    """A trainer on a private Ray, without the helpers that this has no use for. The method is Ray's own: where a
    version has it, or the callbacks, by another name, they start, which costs no more than time and memory."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if type(each).__name__ not in UNNEEDED]


class Workers(BackendConfig):
    """Settings of a run, which go to its controller."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray calls on the controller."""
        return _AllGpus


class _AllGpus(Backend):
    share_cuda_visible_devices = True
