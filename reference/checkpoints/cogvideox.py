"""Translates the names of Hugging Face's CogVideoX weights to the names of this reference.

Both have the same shapes and the same order of values. A layer's modulation [6·D] holds shift, scale and gate of the
video, then those of the text. Hugging Face numbers the levels of the VAE from the deepest, the reference from the
shallowest.
"""

import re

from ttt_video_engine.reference.checkpoints.tensors import LazyStateDict
from ttt_video_engine.runtime.config import VaeConfig

_TRANSFORMER = {
    r"patch_embed\.proj\.": "patch_embedding.vid_proj.",
    r"patch_embed\.text_proj\.": "patch_embedding.text_proj.",
    r"time_embedding\.linear_1\.": "time_embed.0.",
    r"time_embedding\.linear_2\.": "time_embed.2.",
    r"norm_final\.": "transformer_norm.",
    r"norm_out\.norm\.": "final_layer.norm.",
    r"norm_out\.linear\.": "final_layer.adaLN_modulation.1.",
    r"proj_out\.": "final_layer.linear.",
}
_LAYER = {
    r"norm1\.linear\.": "pre_seq_adaLN_modulation.1.",
    r"norm1\.norm\.": "pre_seq_layernorm.",
    r"norm2\.linear\.": "pre_mlp_adaLN_modulation.1.",
    r"norm2\.norm\.": "pre_mlp_layernorm.",
    r"attn1\.to_([qkv])\.": r"seq_modeling_block.\1.",
    r"attn1\.to_out\.0\.": "seq_modeling_block.o.",
    r"attn1\.norm_([qk])\.": r"seq_modeling_block.\1_norm.",
    r"ff\.net\.0\.proj\.": "mlp.layer1.",
    r"ff\.net\.2\.": "mlp.layer2.",
}
_BLOCK = "transformer_blocks."


def is_cogvideox_transformer(state: LazyStateDict) -> bool:
    """Whether the weights have the names of a `CogVideoXTransformer3DModel`."""
    return any(name.startswith(_BLOCK) for name in state)


def cogvideox_transformer(state: LazyStateDict) -> LazyStateDict:
    """The weights of a `CogVideoXTransformer3DModel` under the reference's names. Unknown names are kept.

    It has no TTT layers. It loads into a model that has none, or that initialises them.
    """
    return {_transformer_name(name): value for name, value in state.items()}


def is_cogvideox_vae(state: LazyStateDict) -> bool:
    """Whether the weights have the names of an `AutoencoderKLCogVideoX`."""
    return any(name.startswith("decoder.up_blocks.") for name in state)


def cogvideox_vae_decoder(state: LazyStateDict, config: VaeConfig) -> LazyStateDict:
    """The decoder's weights of an `AutoencoderKLCogVideoX` under the reference's names. Unknown names are kept."""
    names = [name for name in state if name.startswith("decoder.")]
    return {_vae_name(name.removeprefix("decoder."), len(config.ch_mult)): state[name] for name in names}


def _transformer_name(name: str) -> str:
    if not name.startswith(_BLOCK):
        return _renamed(name, _TRANSFORMER)
    layer, _, rest = name.removeprefix(_BLOCK).partition(".")
    return f"layers.{layer}.{_renamed(rest, _LAYER)}"


def _vae_name(name: str, num_levels: int) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"^mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"^up_blocks\.(\d)", lambda found: f"up.{num_levels - 1 - int(found[1])}", name)
    return name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")


def _renamed(name: str, rules: dict[str, str]) -> str:
    for pattern, replacement in rules.items():
        new, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return new
    return name
