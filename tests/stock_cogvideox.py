"""A stock CogVideoX of Hugging Face's classes, tiny and with random weights, in the folder that users download."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ttt_video_engine.export.sources.tokenizer import tiny_prose, train_tokenizer

WIDTH, HEIGHT, TEXT_LENGTH = 48, 32, 226
FACTOR = 4
"""Pixels of a latent along one side. The VAE has one level less than the published one, as tracing it takes long."""
TOKENS, ROWS = 32_100, 32_128
"""Of T5: tokens of its tokenizer, and rows of its embedding."""
SHARD = "300KB"


def transformer(
    *, sample_width: int = WIDTH // FACTOR, sample_height: int = HEIGHT // FACTOR
) -> CogVideoXTransformer3DModel:
    """Three layers, whose weights are large enough for the text to matter."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=3,
        sample_width=sample_width,
        sample_height=sample_height,
        use_rotary_positional_embeddings=True,
    )
    return _widened(model.eval(), 2.5)


def scheduler() -> CogVideoXDDIMScheduler:
    """With the values that CogVideoX-5B is published with."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def save_stock(folder: Path) -> None:
    """Saves a pipeline as CogVideoX-5B is published: in bfloat16, in shards, T5's vocabulary."""
    torch.manual_seed(0)
    text_encoder = T5Config(
        vocab_size=ROWS, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        scaling_factor=0.7,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=T5EncoderModel(text_encoder),
        vae=vae,
        transformer=transformer(),
        scheduler=scheduler(),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)


def load_stock(folder: Path) -> CogVideoXPipeline:
    pipeline = CogVideoXPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer() -> PreTrainedTokenizerFast:
    """The package's own, without its scene tokens, filled up to T5's vocabulary; it ends a text with `</s>`."""
    content = json.loads(train_tokenizer(tiny_prose(), 2002).to_str())
    pieces = content["model"]["vocab"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    pieces += [[f"unused-{number}", -100.0] for number in range(len(pieces), TOKENS)]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _widened(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and "norm" not in name:
                value.mul_(factor)
    return model
