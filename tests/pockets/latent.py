"""Decoders with latent attention."""

from __future__ import annotations

from .base import Pocket, grouped

#: heads*head_dim=120, heads*qk_dim=132, heads*kv_dim=204, kv_rank+rope_dim=13.
LATENT = {
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 4,
    "v_head_dim": 10,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 15,
    "kv_lora_rank": 9,
}


def latent(model_type: str, **changes) -> Pocket:
    """A family with latent attention; changes are fields of the pocket or of its config."""
    return grouped(model_type, **{"kv": False, "variants": ({"q_lora_rank": None},), **LATENT, **changes})


POCKETS: dict[str, Pocket] = {
    "youtu": latent("youtu", pad_token_id=None),  # the stock class zeroes its embedding, though loaded
    "minicpm3": latent("minicpm3", hidden_step=4, dim_model_base=9, attention_bias=True, mlp_bias=True),
}
