"""A shell doubles the resolution of a trained denoiser: a small convolutional network that adds the high band.

The network sees the noisy high-resolution image, the low-resolution estimate and the features behind it. It ends in
a zero gain, so that a new shell changes nothing. Nested growth in the spirit of Matryoshka diffusion
(arXiv 2310.15111); the blocks are those of arXiv 2312.02696.

Shapes: B images of R px, h = R / patch positions of the fine grid, C channels there and 2C on the coarse grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.conditioning import Conditioning, NoiseConditioning
from pipeline.models.kernels import KernelMix
from pipeline.models.layers import Block, Embedding, MPConv, RegionConv, mp_cat, mp_sum
from pipeline.models.resample import pool, resize, upsample


class ShellNet(nn.Module):
    """Raw network F of one shell. Works at R/patch (fine) and half of that (coarse)."""

    def __init__(
        self,
        text_dim: int,
        feature_channels: int,  # of the denoiser below
        patch: int = 2,  # px folded into one position, each way
        channels: int = 32,  # at the fine grid; the coarse grid has twice as many
        num_blocks: int = 1,
        augment_labels: int = 0,  # length of the vector that describes how an image was augmented
        kernels: str = "off",  # adaptive kernels (pipeline/models/kernels.py) and what mixes them
        regions: bool = False,  # the noise level may differ by region
        bands: bool = False,  # the low band may have a noise level of its own
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        assert patch >= 1
        self.patch = patch
        self.kernels = kernels
        self.regions = regions
        self.bands = bands
        self.feature_channels = channels
        emb_channels = 4 * channels
        pixels = image_channels * patch**2
        low_pixels = image_channels * max(patch // 2, 1) ** 2
        wide = 2 * channels

        def block(c_in: int, c_out: int, flavor: str, px: int) -> Block:
            adaptive = kernels != "off" and flavor == "enc"
            mixer = KernelMix(c_out, kernels, px, regions) if adaptive else None
            return Block(c_in, c_out, emb_channels, flavor, regions=regions, mixer=mixer, bands=bands)

        self.embedding = Embedding(2 * channels, emb_channels, text_dim, augment_labels)
        self.conv_in = MPConv(pixels + low_pixels + 1, channels, kernel=3)
        self.region_in = RegionConv(channels) if regions else None
        self.band_in = RegionConv(channels) if bands else None
        self.encoder = nn.ModuleList(block(channels, channels, "enc", patch) for _ in range(num_blocks))
        self.down = block(channels, wide, "enc", 2 * patch)
        self.inject = MPConv(feature_channels, wide, kernel=1)
        self.middle = nn.ModuleList(block(wide, wide, "dec", 2 * patch) for _ in range(num_blocks))
        self.up = block(wide, channels, "dec", patch)
        self.decoder = nn.ModuleList(
            block(2 * channels if i == 0 else channels, channels, "dec", patch) for i in range(num_blocks)
        )
        self.conv_out = MPConv(channels, pixels, kernel=3)
        self.out_gain = nn.Parameter(torch.zeros([]))

    def forward(
        self,
        x: Tensor,
        low: Tensor,
        features: Tensor,
        c_noise: Tensor,
        text: Conditioning,
        regions: Tensor | None = None,
        bands: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict the high band: ([B,3,R,R], features [B,C,h,h]).

        x: scaled noisy images [B,3,R,R].
        low: scaled estimate of the level below [B,3,R/2,R/2].
        features: of the level below [B,F,n,n], on any grid that doubles or halves to the coarse one.
        regions: how the noise level of patches differs from the image's [B,4,g,g].
        bands: how the low band's differs from the high band's [B,4,g,g] or [B,4,1,1].
        """
        # Embedding of noise level, caption and augmentation.
        noise = NoiseConditioning(self.embedding(c_noise, text), c_noise, regions, bands)

        # Pixels of both resolutions to the fine grid.
        if self.patch > 1:
            x, low = F.pixel_unshuffle(x, self.patch), F.pixel_unshuffle(low, self.patch // 2)
        else:
            low = upsample(low)
        x = torch.cat([x, low, torch.ones_like(x[:, :1])], dim=1)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # [B, C, h, h]
        if self.region_in is not None and regions is not None:
            x = x + self.region_in(regions, x.shape[-1]).to(x.dtype)
        if self.band_in is not None and bands is not None:
            x = x + self.band_in(bands, x.shape[-1]).to(x.dtype)

        # Encoder.
        skip = x
        for block in self.encoder:
            x = skip = block(x, noise, text)

        # Coarse grid, where the features of the level below come in.
        x = self.down(pool(x), noise, text)  # [B, 2C, h / 2, h / 2]
        x = mp_sum(x, resize(self.inject(features), x.shape[-1]))
        for block in self.middle:
            x = block(x, noise, text)

        # Decoder.
        x = self.up(upsample(x), noise, text)  # [B, C, h, h]
        x = mp_cat(x, skip)
        for block in self.decoder:
            x = block(x, noise, text)

        # Pixels.
        out = self.conv_out(x) * self.out_gain.to(x.dtype)  # [B, 3 patch^2, h, h]
        return (F.pixel_shuffle(out, self.patch) if self.patch > 1 else out), x
