"""Noise levels that differ by region of an image: how maps of them are drawn for training.

Maps that do not depend on the image keep the trained denoiser exact for every map (the rule of Patch Forcing,
arXiv 2604.19141); `bridge_maps` lets them follow the network's own estimate without that loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.denoiser import expand, mean_square
from pipeline.models.resample import high_pass

MEAN_ABS_NORMAL = 0.8  # mean of |N(0,1)|, rounded


def smooth(x: Tensor) -> Tensor:
    """Mean over each 3x3 neighbourhood, of [B,1,h,w]; at the edge over what lies inside."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def region_sigma(
    sigma: Tensor,
    grid: Sequence[int],
    probability: float,
    generator: torch.Generator,
    sigma_max: float,
    sigma_min: float = 0.002,
    finished: float = 0.0,
) -> Tensor:
    """Turn one level an image [B] into maps of h x w patches [B,1,h,w], `grid` being (h, w); drawn without looking
    at images.

    With `probability` an image gets ln S_p = ln sigma + w (n_p - 0.8), w ~ U(0, 1.5), n_p = |N(0,1)|, half the
    time smoothed over 3x3 patches and scaled back to mean 0.8: most patches lie near a cleanest level, and the
    mean of ln S stays ln sigma (arXiv 2604.19141). A fraction `finished` of its patches is at sigma_min. Levels
    are clipped to [sigma_min, sigma_max]. The other images keep their level everywhere."""
    device, shape = generator.device, (len(sigma), 1, *grid)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    n = torch.randn(shape, generator=generator, device=device).abs()
    soft = smooth(n)
    soft = soft * (MEAN_ABS_NORMAL / soft.mean(dim=(1, 2, 3), keepdim=True))
    n = torch.where(uniform(len(sigma), 1, 1, 1) < 0.5, soft, n)
    w = 1.5 * uniform(len(sigma), 1, 1, 1)
    level = sigma[:, None, None, None].expand(shape)
    mixed = (level * (w * (n - MEAN_ABS_NORMAL)).exp()).clamp(sigma_min, sigma_max)
    mixed = torch.where(uniform(*shape) < finished, sigma_min, mixed)
    return torch.where(uniform(len(sigma), 1, 1, 1) < probability, mixed, level)


def detail(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Mean square of the high band over each of `grid`, (h, w), square patches of images [B,C,H,W]: [B,1,h,w]."""
    return mean_square(high_pass(images), images.new_ones(len(images), 1, *grid))


def arrange(sigma: Tensor, energy: Tensor) -> Tensor:
    """The levels of each map [B,1,h,w] in the order of `energy`: the highest where it is highest."""
    place = energy.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return sigma.flatten(1).sort(dim=1).values.gather(1, place).view(sigma.shape)


def bridge_noise(sigma: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Noise for maps `sigma` [B,1,h,w] that goes on from x + top noise, `top` being the highest level of each map:
    r noise + sqrt(1 - r^2) fresh, r = sigma / top; [B,C,H,W].

    x + sigma times it is the Brownian bridge from x + top noise down to x: standard normal for a map that does not
    know `noise`, and x + top noise is the result with more noise, independent of both."""
    ratio = sigma / sigma.amax(dim=(1, 2, 3), keepdim=True)
    fresh = torch.randn(noise.shape, generator=generator, device=noise.device)
    rest = (-torch.expm1(2 * ratio.log())).sqrt()  # 0 at the highest level
    return expand(ratio, noise.shape[-1]) * noise + expand(rest, noise.shape[-1]) * fresh


def bridge_maps(
    denoise: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    sigma: Tensor,
    noise: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Arrange the levels of maps `sigma` [B,1,h,w] by the estimate `denoise(x + top noise, top)` of the images
    [B,C,H,W] at the highest of them: the less detail in a patch, the lower its level. Returns the maps, and noise
    that leads there by a Brownian bridge.

    They do not leak the images: the map depends on x through x + top noise, which is z = x + sigma noise with more
    noise, so that z determines it, and E[x | z, sigma] is the same as for maps drawn independently of x."""
    top = sigma.amax(dim=(1, 2, 3))
    estimate = denoise(images + expand(top, images.shape[-1]) * noise, top)
    sigma = arrange(sigma, detail(estimate, sigma.shape[-2:]))
    return sigma, bridge_noise(sigma, noise, generator)
