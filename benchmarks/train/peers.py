"""The peers' networks, the plans that may be chosen for them, and their recipes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train.crescendo import RandomBatches
from benchmarks.train.settings import DDPM, DIFFUSERS, Plan, Setting

PLANS: dict[str, list[tuple[tuple[int, ...], int]]] = {
    DIFFUSERS: [
        ((1, 1, 2, 2, 4, 4), 2),
        ((1, 2, 2, 2), 2),
        ((1, 2, 3, 4), 2),
        ((1, 2, 2, 2), 1),
        ((1, 2, 4), 1),
    ],
    DDPM: [((1, 2, 4, 8), 2), ((1, 2, 2, 4), 2), ((1, 2, 4), 2), ((1, 2, 2), 2)],
}
WIDTHS = (*range(8, 64, 4), *range(64, 513, 8))


def _diffusers(plan: Plan, resolution: int) -> nn.Module:
    """UNet2DModel as its example builds it: attention at the last level but one (at the last if there are few)."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    count = len(plan.multiples)
    attends = [i == (count - 2 if count > 4 else count - 1) for i in range(count)]
    net: nn.Module = UNet2DModel(
        sample_size=resolution,
        layers_per_block=plan.blocks,
        block_out_channels=tuple(plan.width * m for m in plan.multiples),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=math.gcd(32, plan.width),
    )
    return net


def _ddpm(plan: Plan, resolution: int, flash: bool = False) -> nn.Module:
    """Unet as its README builds it."""
    from denoising_diffusion_pytorch import Unet

    net: nn.Module = Unet(plan.width, dim_mults=plan.multiples, flash_attn=flash)
    return net


BUILDERS: dict[str, Callable[[Plan, int], nn.Module]] = {DIFFUSERS: _diffusers, DDPM: _ddpm}


Recipe = Callable[[nn.Module, torch.device], tuple[torch.optim.Optimizer, Callable[[], None]]]


class Peer:
    """A peer's network with the recipe of its own training script."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        setting: Setting,
        channels_last: bool,
        recipe: Recipe | None = None,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.setting, self.channels_last = setting, channels_last
        flash = {"flash": True} if name == DDPM and setting.device.type == "cuda" else {}
        self.net = BUILDERS[name](plan, setting.resolution, **flash).to(setting.device)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        if compiled:
            self.net.compile(dynamic=False)
        self.images = RandomBatches(setting.resolution, setting.batch).images
        self.optimizer, self.average = (recipe or RECIPES[name])(self.net, setting.device)
        angle = torch.linspace(0.01, math.pi / 2, 1000, device=setting.device)
        self.signal, self.noise = angle.cos(), angle.sin()

    def step(self) -> None:
        """One update."""
        setting, device = self.setting, self.setting.device
        images = self.images.to(device).float() / 127.5 - 1
        times = torch.randint(1000, (setting.batch,), device=device)
        noise = torch.randn_like(images)
        noisy = self.signal[times, None, None, None] * images + self.noise[times, None, None, None] * noise
        if self.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.dtype is torch.bfloat16):
            output = self.net(noisy, times)
        predicted = output if isinstance(output, Tensor) else output.sample
        F.mse_loss(predicted.float(), noise).backward()
        self.update()

    def update(self) -> None:
        """What follows the gradient."""
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()

    def gradients(self) -> None:
        """Any gradient."""
        for parameter in self.net.parameters():
            parameter.grad = torch.randn_like(parameter)


def diffusers_recipe(
    net: nn.Module, device: torch.device, fused: bool | None = None, foreach: bool | None = None
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Of its unconditional example; its foreach switch is on where it pays, on a GPU."""
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=fused
    )
    foreach = device.type == "cuda" if foreach is None else foreach
    average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=foreach)
    return optimizer, lambda: average.step(net.parameters())


def ddpm_recipe(
    net: nn.Module, device: torch.device, every: int = 10
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Of its Trainer: the average takes part in every tenth update."""
    from ema_pytorch import EMA

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(net, beta=0.995, update_every=every, update_after_step=0)
    return optimizer, average.update


RECIPES: dict[str, Recipe] = {DIFFUSERS: diffusers_recipe, DDPM: ddpm_recipe}
