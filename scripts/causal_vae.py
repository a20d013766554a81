"""Runs AutoencoderKLWan on a whole clip at once, for training; it owns no weights and is never shipped.

The stock model walks through a clip in chunks of four frames and hands the last two frames of every causal
convolution on to the next chunk. Zero padding in time over the whole clip gives the same numbers, with one
exception that has to be kept: at each temporal resampling the first frame passes by the time convolution, and
on the way up the remaining frames do not see it.

Activations are `[batch, frames, height, width, channels]`, contiguous: norms and 1x1 convolutions work on
rows, and convolutions see channels-last memory without a copy.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import Tensor, nn
from torch.nn import functional as F


def _normalise(rows: Tensor, gamma: Tensor, activate: bool) -> Tensor:
    """Root-mean-square norm of `[frames, pixels, channels]` by `[frames, channels]`, then SiLU if asked."""
    channels = rows.shape[-1]
    result = F.normalize(rows.float(), dim=-1) * (channels**0.5) * gamma[:, None]
    return (F.silu(result) if activate else result).to(rows.dtype)


class WholeClip:
    """Encodes and decodes whole clips with the weights of `vae`, differentiable.

    Args:
        vae: the stock model; its parameters are read at each call and never copied.
        compiled: fuses the norms by `torch.compile`. Everything else is a library call already, so nothing
            more is compiled, and one graph per channel count serves every clip length and size.
    """

    def __init__(self, vae: AutoencoderKLWan, compiled: bool = False) -> None:
        if vae.config.is_residual or vae.config.patch_size is not None or vae.config.attn_scales:
            raise ValueError("only the Wan 2.1 form is handled: is_residual=False, patch_size=None, attn_scales=[]")
        self.vae = vae
        self.compiled = compiled
        # Frame and pixel counts are marked dynamic below, channel counts stay constants for a fast reduction.
        self._fused = torch.compile(_normalise, dynamic=False) if compiled else _normalise

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance `[batch, z, latent frames, height / 8, width / 8]` of pixels in [-1, 1]."""
        encoder = self.vae.encoder
        x = self._causal(encoder.conv_in, video.permute(0, 2, 3, 4, 1).contiguous())
        for block in encoder.down_blocks:
            x = self._down(block, x) if isinstance(block, WanResample) else self._residual(block, x)
        x = self._norm(encoder.norm_out, self._middle(encoder.mid_block, x))
        moments = _pointwise(self.vae.quant_conv, self._causal(encoder.conv_out, x)).permute(0, 4, 1, 2, 3)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[batch, 3, frames, height, width]`, not clamped."""
        decoder = self.vae.decoder
        x = _pointwise(self.vae.post_quant_conv, latents.permute(0, 2, 3, 4, 1).contiguous())
        x = self._middle(decoder.mid_block, self._causal(decoder.conv_in, x))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            for upsampler in block.upsamplers or ():
                x = self._up(upsampler, x)
        x = self._causal(decoder.conv_out, self._norm(decoder.norm_out, x))
        return x.permute(0, 4, 1, 2, 3).float()

    def _norm(self, norm: nn.Module, x: Tensor, activate: bool = True) -> Tensor:
        rows = x.flatten(2, 3).flatten(0, 1)
        # One copy for each frame, so that the gradient is summed frame by frame, not by one thread block.
        gamma = norm.gamma.flatten().repeat(len(rows), 1)
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(rows, (0, 1))
            torch._dynamo.maybe_mark_dynamic(gamma, 0)
        return self._fused(rows, gamma, activate).view(x.shape)

    def _causal(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        """A 3x3x3 convolution, zero-padded before the first frame only."""
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
        out = F.conv3d(padded.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, padding=(0, 1, 1))
        return out.permute(0, 2, 3, 4, 1).contiguous()

    def _residual(self, block: WanResidualBlock, x: Tensor) -> Tensor:
        shortcut = _pointwise(block.conv_shortcut, x) if isinstance(block.conv_shortcut, nn.Conv3d) else x
        x = self._causal(block.conv1, self._norm(block.norm1, x))
        return self._causal(block.conv2, self._norm(block.norm2, x)) + shortcut

    def _middle(self, block: nn.Module, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        return self._residual(block.resnets[1], self._attention(block.attentions[0], x))

    def _attention(self, block: WanAttentionBlock, x: Tensor) -> Tensor:
        """One head over the pixels of each frame."""
        rows = self._norm(block.norm, x, activate=False).flatten(2, 3).flatten(0, 1)[:, None]
        query, key, value = F.linear(rows, block.to_qkv.weight.flatten(1), block.to_qkv.bias).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + F.linear(mixed, block.proj.weight.flatten(1), block.proj.bias).view(x.shape)

    def _down(self, block: WanResample, x: Tensor) -> Tensor:
        conv = block.resample[1]
        x = _per_frame(F.pad(x, (0, 0, 0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        if block.mode == "downsample2d" or x.shape[1] == 1:
            return x
        rest = _time_taps(block.time_conv, torch.cat([x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]], -1))
        return torch.cat([x[:, :1], rest], 1)

    def _up(self, block: WanResample, x: Tensor) -> Tensor:
        if block.mode == "upsample3d" and x.shape[1] > 1:
            # The first frame is not doubled, and the padding before the second hides it from the others.
            rest = F.pad(x[:, 1:], (0, 0, 0, 0, 0, 0, 2, 0))
            rest = _time_taps(block.time_conv, torch.cat([rest[:, :-2], rest[:, 1:-1], rest[:, 2:]], -1))
            rest = rest.unflatten(-1, (2, -1)).movedim(4, 2).flatten(1, 2)
            x = torch.cat([x[:, :1], rest], 1)
        batch, frames, height, width, channels = x.shape
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
        x = x.reshape(batch, frames, 2 * height, 2 * width, channels)
        conv = block.resample[1]
        return _per_frame(x, conv.weight, conv.bias, padding=1)


def _pointwise(conv: nn.Conv3d, x: Tensor) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _time_taps(conv: nn.Conv3d, taps: Tensor) -> Tensor:
    """A (3, 1, 1) convolution of three taps that already lie side by side in the channels."""
    return F.linear(taps, conv.weight.transpose(1, 2).flatten(1), conv.bias)


def _per_frame(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride=stride, padding=padding)
    return out.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])
