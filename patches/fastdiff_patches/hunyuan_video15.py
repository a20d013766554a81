"""HunyuanVideo 1.5's attention without the tokens x tokens mask that its stock processor builds in every block.

Text that is padding is hidden as keys. As queries the stock mask lets it see nothing and here it sees the rest, which
changes the padding alone: nobody sees it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_hunyuan_video15 as stock


class HunyuanVideo15AttnProcessor2_0(stock.HunyuanVideo15AttnProcessor2_0):
    """The stock processor with a mask of keys, bool `[batch, 1, 1, tokens]`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(2, (attn.heads, -1))

        query = attn.norm_q(split(attn.to_q(hidden_states)))
        key = attn.norm_k(split(attn.to_k(hidden_states)))
        value = split(attn.to_v(hidden_states))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        if encoder_hidden_states is not None:
            text_query = split(attn.add_q_proj(encoder_hidden_states))
            text_key = split(attn.add_k_proj(encoder_hidden_states))
            if attn.norm_added_q is not None:
                text_query = attn.norm_added_q(text_query)
            if attn.norm_added_k is not None:
                text_key = attn.norm_added_k(text_key)
            query = torch.cat([query, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, split(attn.add_v_proj(encoder_hidden_states))], dim=1)

        seen = F.pad(attention_mask.bool(), (key.shape[1] - attention_mask.shape[1], 0), value=True)
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=seen[:, None, None],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return out, None
        video, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def masks_keys(processor: Any) -> Any:
    """The same processor with a mask of keys; one that a user has set is left as it is."""
    if type(processor) is not stock.HunyuanVideo15AttnProcessor2_0:
        return processor
    copied = copy.copy(processor)
    copied.__class__ = HunyuanVideo15AttnProcessor2_0
    return copied
