"""The low-resolution core: a magnitude-preserving U-Net with attention and text (arXiv 2312.02696, figure 21).

With `patch` > 1 the pixels are first folded into channels (space to depth), which spends the same arithmetic in
wider layers on a coarser grid: on a CPU this trains several times faster per image.

Shapes: B images of R px, h = R / patch positions of the finest feature map, C its channels, w those of a level.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.conditioning import Conditioning, NoiseConditioning
from pipeline.models.kernels import KernelMix
from pipeline.models.layers import Block, Embedding, MPConv, RegionConv, mp_cat
from pipeline.models.resample import pool, upsample

MIN_KERNEL_PX = 32  # feature maps of fewer px (positions times `patch`) keep plain convolutions


class UNet(nn.Module):
    """Raw network F of the preconditioned denoiser: noisy pixels in, unit-variance prediction out."""

    def __init__(
        self,
        resolution: int,  # px of the images
        text_dim: int,  # width of the caption embedding
        patch: int = 1,  # px folded into one position of the feature map, each way
        channels: int = 64,  # at the finest level
        channel_mult: tuple[int, ...] = (1, 2, 2),  # per level, each half the size of the one before
        num_blocks: int = 1,  # residual blocks a level in the encoder; the decoder has one more
        attention: tuple[int, ...] = (8,),  # feature-map sizes that attend to themselves and to the text
        dropout: float = 0.0,
        augment_labels: int = 0,  # length of the vector that describes how an image was augmented
        kernels: str = "off",  # adaptive kernels (pipeline/models/kernels.py) and what mixes them
        regions: bool = False,  # the noise level may differ by region
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.regions = regions
        widths = [channels * m for m in channel_mult]
        emb_channels = max(widths)
        self.feature_channels = widths[0]
        self.encoder_channels: list[int] = []  # of the last encoder block of each level
        self.embedding = Embedding(channels, emb_channels, text_dim, augment_labels)

        def block(c_in: int, c_out: int, flavor: str, size: int) -> Block:
            adaptive = kernels != "off" and flavor == "enc" and size * patch >= MIN_KERNEL_PX
            return Block(
                c_in,
                c_out,
                emb_channels,
                flavor,
                text_dim if size in attention else 0,
                dropout,
                regions=regions,
                mixer=KernelMix(c_out, kernels, resolution // size, regions) if adaptive else None,
            )

        pixels = image_channels * patch**2
        size = resolution // patch
        # Encoder.
        self.conv_in = MPConv(pixels + 1, widths[0], kernel=3)  # one constant channel stands for a bias
        self.region_in = RegionConv(widths[0]) if regions else None
        self.encoder = nn.ModuleList()
        skips = [widths[0]]
        width = widths[0]
        for level, c_out in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(num_blocks):
                blocks.append(block(width, c_out, "enc", size >> level))
                width = c_out
                skips.append(width)
            self.encoder.append(blocks)
            self.encoder_channels.append(width)
        # Decoder.
        self.middle = block(width, width, "dec", size >> (len(widths) - 1))
        self.decoder = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(num_blocks + (level == 0)):
                blocks.append(block(width + skips.pop(), c_out, "dec", size >> level))
                width = c_out
            self.decoder.append(blocks)
        self.conv_out = MPConv(width, pixels, kernel=3)
        self.out_gain = nn.Parameter(torch.zeros([]))

    def encode(
        self, x: Tensor, c_noise: Tensor, text: Conditioning, regions: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], NoiseConditioning]:
        """Run the encoder on [B,3,R,R]. Returns (all skips, last feature map of each level, noise level)."""
        # Embedding of noise level, caption and augmentation.
        noise = NoiseConditioning(self.embedding(c_noise, text), c_noise, regions)

        # Pixels to the finest feature map.
        if self.patch > 1:
            x = F.pixel_unshuffle(x, self.patch)  # [B, 3 patch^2, h, h]
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # [B, C, h, h]
        if self.region_in is not None and regions is not None:
            x = x + self.region_in(regions, x.shape[-1]).to(x.dtype)

        # Encoder.
        skips, levels = [x], []
        for level, blocks in enumerate(self.encoder):
            assert isinstance(blocks, nn.ModuleList)
            x = pool(x) if level else x
            for layer in blocks:
                x = layer(x, noise, text)  # [B, w, h / 2^level, h / 2^level]
                skips.append(x)
            levels.append(x)
        return skips, levels, noise

    def forward(
        self, x: Tensor, c_noise: Tensor, text: Conditioning, regions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map [B,3,R,R] to (prediction [B,3,R,R], decoder features [B,C,h,h]).

        `regions` [B,4,g,g]: how the noise level of patches differs from the image's (`region_features`)."""
        # Encoder.
        skips, _, noise = self.encode(x, c_noise, text, regions)

        # Decoder: each block takes the next skip, last first.
        x = self.middle(skips[-1], noise, text)
        for level, blocks in enumerate(self.decoder):
            assert isinstance(blocks, nn.ModuleList)
            x = upsample(x) if level else x
            for layer in blocks:
                x = layer(mp_cat(x, skips.pop()), noise, text)  # at last [B, C, h, h]

        # Pixels.
        out = self.conv_out(x) * self.out_gain.to(x.dtype)  # [B, 3 patch^2, h, h]
        return (F.pixel_shuffle(out, self.patch) if self.patch > 1 else out), x
