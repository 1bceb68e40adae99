"""The sizes of the demo model."""

from ttt_video_engine.runtime.config import ModelConfig, TextEncoderConfig, TransformerConfig, VaeConfig

# Chosen so that 24 patches a frame and the text fill mini-batches of 16 at every length.
_TEXT_LENGTHS = {"3s": 24, "9s": 24, "18s": 28, "30s": 28, "63s": 24}

MODEL = ModelConfig(
    name="demo",
    width=96,
    height=64,
    text_lengths=_TEXT_LENGTHS,
    transformer=TransformerConfig(
        ttt="linear",
        model_dim=192,
        num_heads=6,
        num_layers=6,
        text_dim=128,
        time_embed_dim=128,
        mini_batch_size=16,
        ttt_base_lr=1.0,
    ),
    vae=VaeConfig(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1, scale_factor=1.0, temporal_window=2),
    text_encoder=TextEncoderConfig(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=439),
)
