"""The peers: networks and samplers of the libraries themselves, with the recipes of their own training scripts.

A peer is trained and sampled without guidance, and so without dropping captions. Its samples are drawn in batches,
each from a seed of its own. diffusers and denoising-diffusion-pytorch are optional; EDM2's configuration is in
edm2.py.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality import edm2
from benchmarks.quality.base import Conditions, Peer, Sampler, Setting, State, Task, TorchPeer
from pipeline.models.conditioning import Conditioning
from pipeline.training.levels import ema_decays
from pipeline.training.state import Learner

DIFFUSERS = "diffusers UNet2DConditionModel"
DDPM = "denoising-diffusion-pytorch Unet"
EDM2 = "EDM2's configuration"
EMA_STD = 0.10  # of EDM2's average
WARMUP = 0.02  # of the training
GROUP = 4  # channels in a group of diffusers' norms, as in its example; alone they would lose their mean


def shape_like(values: Tensor, x: Tensor) -> Tensor:
    """[B] as [B,1,1,1]."""
    return values.view(-1, *[1] * (x.ndim - 1))


class Diffusers(TorchPeer):
    """UNet2DConditionModel with cross-attention to the caption's tokens at its coarsest level, by the recipe of the
    library's unconditional example: linear betas, the noise as target, AdamW, cosine schedule, its EMA."""

    def __init__(self, task: Task, setting: Setting) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

        plan = setting.plan
        attends = [i == len(plan.multiples) - 1 for i in range(len(plan.multiples))]
        net = UNet2DConditionModel(
            sample_size=task.resolution,
            in_channels=3,
            out_channels=3,
            layers_per_block=plan.blocks,
            block_out_channels=tuple(plan.width * m for m in plan.multiples),
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            norm_num_groups=plan.width // GROUP,
            cross_attention_dim=task.text_dim,
            attention_head_dim=8,
        )
        optimizer = torch.optim.AdamW(net.parameters(), betas=(0.95, 0.999), weight_decay=1e-6)
        super().__init__(task, setting, net, optimizer)
        training = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.signal, self.noise = training.alphas_cumprod.sqrt(), (1 - training.alphas_cumprod).sqrt()
        options = {"timestep_spacing": "trailing"}
        self.samplers = {
            "DDIM": self._sampler(DDIMScheduler.from_config(training.config, **options)),
            "DPM-Solver++": self._sampler(
                DPMSolverMultistepScheduler.from_config(training.config, **options)
            ),
        }

    def call(self, x: Tensor, times: Tensor, text: Conditioning) -> Tensor:
        """One call of the network."""
        return self.precise(lambda: self.net(x, times, text.tokens, encoder_attention_mask=text.mask).sample)

    def loss(self, images: Tensor, conditions: Conditions, generator: torch.Generator) -> Tensor:
        times = torch.randint(1000, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        noisy = (
            shape_like(self.signal[times], images) * images + shape_like(self.noise[times], images) * noise
        )
        return F.mse_loss(self.call(noisy, times, conditions.text), noise)

    def learning_rate(self, progress: float) -> float:
        done = max(progress - WARMUP, 0) / (1 - WARMUP)
        return self.setting.lr * min(progress / WARMUP, (1 + math.cos(math.pi * min(done, 1))) / 2)

    def decay(self) -> float:
        return min(1 - (1 + self.updates) ** -0.75, 0.9999)

    def _sampler(self, scheduler: Any) -> Sampler:
        def sample(conditions: Conditions, calls: int, seed: int) -> Tensor:
            scheduler.set_timesteps(calls)
            x = self.fresh_noise(len(conditions.groups), seed) * scheduler.init_noise_sigma
            for time in scheduler.timesteps:
                output = self.call(scheduler.scale_model_input(x, time), time.expand(len(x)), conditions.text)
                x = scheduler.step(output, time, x).prev_sample
            return x

        return sample


class Ddpm(TorchPeer):
    """The Unet with classes of classifier_free_guidance, which are the groups of the data, since it cannot read
    captions; by the recipe of its Trainer, with v as the target, as the library's main class has it."""

    sees = "groups"

    def __init__(self, task: Task, setting: Setting) -> None:
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

        plan = setting.plan
        net = Unet(plan.width, task.num_groups, cond_drop_prob=0.0, dim_mults=plan.multiples)
        super().__init__(task, setting, net, torch.optim.Adam(net.parameters(), betas=(0.9, 0.99)))
        self.options = {
            "image_size": task.resolution,
            "timesteps": 1000,
            "objective": "pred_v",
            "ddim_sampling_eta": 0.0,
        }
        self.diffusion = GaussianDiffusion(Unguided(self.call), **self.options)
        self.library = GaussianDiffusion
        self.samplers = {"DDIM": self._sample}

    def call(self, x: Tensor, times: Tensor, groups: Tensor) -> Tensor:
        """One call of the network."""
        return self.precise(lambda: self.net(x, times, groups, cond_drop_prob=0.0))

    def loss(self, images: Tensor, conditions: Conditions, generator: torch.Generator) -> Tensor:
        times = torch.randint(1000, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        return self.diffusion.p_losses(images, times, classes=conditions.groups, noise=noise)

    def learning_rate(self, progress: float) -> float:
        return self.setting.lr * min(progress / WARMUP, 1)

    def decay(self) -> float:
        """That of ema-pytorch, which takes part in every tenth update there."""
        return min(1 - (1 + self.updates / 10) ** (-2 / 3), 0.995) ** 0.1

    def _sample(self, conditions: Conditions, calls: int, seed: int) -> Tensor:
        diffusion = self.library(self.diffusion.model, **self.options, sampling_timesteps=calls)
        shape = (len(conditions.groups), 3, self.task.resolution, self.task.resolution)
        with torch.random.fork_rng(), redirect_stderr(io.StringIO()):  # its own noise, its progress bar
            torch.manual_seed(seed)
            return diffusion.ddim_sample(conditions.groups, shape, cond_scale=1.0) * 2 - 1


class Unguided(nn.Module):
    """The network as GaussianDiffusion asks for it. With a guidance of 1 the library's own method returns one
    tensor where two are expected."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.channels = self.out_dim = 3
        self.random_or_learned_sinusoidal_cond, self.cond_drop_prob = False, 0.0

    def forward(self, x: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        return self.call(x, times, classes)

    def forward_with_cond_scale(
        self, x: Tensor, times: Tensor, classes: Tensor, **_: float
    ) -> tuple[Tensor, Tensor]:
        output = self(x, times, classes)
        return output, output


class Edm2(Peer):
    """See edm2.py. Adam without clipping; 1/sqrt schedule; a power-function average; Heun's sampler."""

    calls = (7, 15, 31, 63)

    def __init__(self, task: Task, setting: Setting) -> None:
        plan = setting.plan
        net = edm2.UNet(task.resolution, task.text_dim, plan.width, plan.multiples, plan.blocks)
        self.denoiser = edm2.Denoiser(net)
        self.denoiser.dtype = torch.bfloat16 if setting.half else torch.float32
        super().__init__(task, setting, self.denoiser)
        self.learner = Learner(self.denoiser, (0.9, 0.99), ema_decays([EMA_STD]))
        self.nimg = 0
        self.samplers = {"Heun": self._sample}

    def loss(self, images: Tensor, conditions: Conditions, generator: torch.Generator) -> Tensor:
        return self.denoiser.loss(images, conditions.text.pooled, generator).mean()

    def update(
        self, images: Tensor, conditions: Conditions, progress: float, generator: torch.Generator
    ) -> float:
        loss = self.loss(images, conditions, generator)
        loss.backward()
        self.learner.update(edm2.learning_rate(self.setting.lr, progress), self.nimg, len(images))
        self.nimg += len(images)
        return float(loss.detach())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with self.learner.using(self.learner.emas[f"{EMA_STD:g}"]):
            yield

    def state(self) -> State:
        learner = self.learner
        adam = learner.moments
        return {
            "weights": learner.weights.detach(),
            "adam": dict(adam),
            "emas": learner.emas,
            "nimg": self.nimg,
        }

    def load(self, state: State) -> None:
        learner = self.learner
        learner.weights.data.copy_(state["weights"])
        learner.moments.update(state["adam"])
        learner.emas, self.nimg = state["emas"], state["nimg"]

    def _sample(self, conditions: Conditions, calls: int, seed: int) -> Tensor:
        caption, noise = conditions.text.pooled, self.fresh_noise(len(conditions.groups), seed)
        return edm2.heun(lambda x, sigma: self.denoiser(x, sigma, caption), noise, (calls + 1) // 2)


KINDS: dict[str, Callable[[Task, Setting], Peer]] = {EDM2: Edm2, DIFFUSERS: Diffusers, DDPM: Ddpm}
