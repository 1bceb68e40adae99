"""The T5 v1.1 encoder that turns prompts into embeddings: Transformers' own, without an attention mask."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

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
        for feed_forward in [part for part in self.t5.modules() if isinstance(part, T5DenseGatedActDense)]:
            wo = FeedForwardOutput(config.d_ff, config.d_model, bias=False, device="meta")
            wo.weight, feed_forward.wo = feed_forward.wo.weight, wo

    def forward(self, ids: Tensor) -> Tensor:
        return self.t5(input_ids=ids).last_hidden_state


class FeedForwardOutput(nn.Linear):
    """Returns float32, so that T5's residual stream is float32 after the first feed-forward layer.

    Trained weights produce values that float16 cannot hold. So with float16 weights the product is computed in float32
    too, as Transformers does, which keeps these weights (`wo`) in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float16:
            return functional.linear(x.float(), self.weight.float())
        return super().forward(x).float()
