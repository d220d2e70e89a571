"""What Ray Train does for our workers: nothing, but that those of a node see all its GPUs, as NCCL wants it.
They make their process group themselves (meeting.py).

Ray's own settings for PyTorch would import torch in the driver and in the controller of a run, which need none: it
takes each 280 MiB and two seconds, one after the other, before the first worker starts.
"""

from __future__ import annotations

from ray.train.backend import Backend, BackendConfig


class Workers(BackendConfig):  # type: ignore[misc]  # Ray has no types for it
    """Settings of a run, which go to its controller."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray calls on the controller."""
        return _AllGpus


class _AllGpus(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True
