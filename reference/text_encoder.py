"""The T5 v1.1 encoder that turns prompts into embeddings: Transformers' own, without an attention mask."""

from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from ttt_video_engine.runtime.config import TextEncoderConfig


class TextEncoder(nn.Module):
    """ids [B, N] int64 → last hidden state [B, N, d_model]. Padding is attended, as the model was trained."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_kv=config.d_kv,
                d_ff=config.d_ff,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                feed_forward_proj="gated-gelu",
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        embeddings: Tensor = self.t5(input_ids=ids).last_hidden_state
        return embeddings
