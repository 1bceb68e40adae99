"""The PyTorch model: orders of tokens, the learning rates' quirk, windows of decoding, names of parameters."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import refused_with
from torch import Tensor

from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.layout import TokenLayout
from ttt_video_engine.reference.text_encoder import TextEncoder
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.reference.ttt_layer import TTTLayer, TTTLinear
from ttt_video_engine.reference.vae import ConvCache, VaeDecoder, windows
from ttt_video_engine.runtime.config import TransformerConfig, TTTKind, VaeConfig
from ttt_video_engine.runtime.presets import tiny


def config(ttt: TTTKind = "linear", **sizes: int) -> TransformerConfig:
    defaults: dict[str, Any] = {"model_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 24, "time_embed_dim": 40}
    return TransformerConfig(ttt=ttt, ttt_base_lr=0.5, **{"mini_batch_size": 16, **defaults, **sizes})


def layout(scenes: int, text_length: int, height: int = 2, width: int = 3, **sizes: int) -> TokenLayout:
    model = config("linear", **sizes)
    num_frames = scenes * model.attn_length + model.prefix_temporal_length
    return TokenLayout(model, scenes, text_length, num_frames, height, width)


LAYOUTS = st.builds(
    layout,
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 3),
    attn_length=st.integers(2, 5),
    prefix_temporal_length=st.integers(1, 2),
)


def interleaved(of: TokenLayout) -> list[int]:
    """Token by token: the text of each scene, then its frames, of which the first scene has the prefix as well."""
    order = []
    for scene in range(of.num_scenes):
        order += [scene * of.text_length + token for token in range(of.text_length)]
        first = 0 if scene == 0 else scene * of.config.attn_length + of.config.prefix_temporal_length
        last = (scene + 1) * of.config.attn_length + of.config.prefix_temporal_length
        for frame in range(first, last):
            start = of.num_text_tokens + frame * of.tokens_per_frame
            order += [start + patch for patch in range(of.tokens_per_frame)]
    return order


# Orders of tokens


@given(of=LAYOUTS)
def test_interleaving_is_what_a_loop_over_scenes_gives(of: TokenLayout) -> None:
    assert of.interleaved_order.tolist() == interleaved(of)


@given(of=LAYOUTS)
def test_orders_are_permutations_and_their_own_way_back(of: TokenLayout) -> None:
    tokens = torch.arange(of.num_tokens)
    for order in (of.interleaved_order, of.standard_order, of.reversed_order):
        assert torch.equal(order.sort().values, tokens)
    assert torch.equal(of.interleaved_order[of.standard_order], tokens)
    assert torch.equal(of.standard_order[of.interleaved_order], tokens)
    assert torch.equal(of.reversed_order[of.reversed_order], tokens)


@given(of=LAYOUTS)
def test_reversal_turns_scenes_of_text_and_single_video_tokens(of: TokenLayout) -> None:
    scenes = [[scene * of.text_length + token for token in range(of.text_length)] for scene in range(of.num_scenes)]
    text = list(itertools.chain(*reversed(scenes)))
    assert of.reversed_order.tolist() == text + list(range(of.num_tokens - 1, of.num_text_tokens - 1, -1))


@given(of=LAYOUTS)
def test_segments_share_their_prefix_frames(of: TokenLayout) -> None:
    length, prefix = of.config.attn_length, of.config.prefix_temporal_length
    assert of.segment_frames.tolist() == [
        list(range(scene * length, scene * length + length + prefix)) for scene in range(of.num_scenes)
    ]


# The TTT layer


def ttt_inputs_of_scan(of: TokenLayout, x: Tensor) -> tuple[TTTLayer, list[Tensor]]:
    """A layer with random weights, and what it hands to its scan."""
    layer = seeded(lambda: TTTLinear(of.config), seed=1)
    torch.nn.init.normal_(layer.learnable_ttt_lr_weight, generator=torch.Generator().manual_seed(2))
    torch.nn.init.normal_(layer.learnable_ttt_lr_bias, generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []

    def scan(*inputs: Tensor) -> Tensor:
        seen.extend(inputs)
        return inputs[0]

    layer.scan = scan  # type: ignore[assignment]  # of any number of inputs
    with torch.no_grad():
        layer(x, of)
    return layer, seen


# One patch a frame, and scenes whose tokens (text and 13 or 12 frames) are no multiple of the mini-batch.
@pytest.mark.parametrize(("scenes", "text_length", "size"), [(1, 7, 4), (2, 5, 5), (3, 9, 4)])
def test_learning_rates_are_cut_before_the_scenes_are_interleaved(scenes: int, text_length: int, size: int) -> None:
    """Trained weights depend on it: a mini-batch takes the rates of the one that its last token was in before."""
    of = layout(scenes, text_length, 1, 1, mini_batch_size=size)
    x = torch.randn(2, of.num_tokens, of.config.model_dim, generator=torch.Generator().manual_seed(0))
    layer, (*_, eta, _, _, _, _) = ttt_inputs_of_scan(of, x)

    # Token by token, as the definition reads; [B][H][L].
    weight, bias = layer.learnable_ttt_lr_weight, layer.learnable_ttt_lr_bias
    base, head_dim = of.config.ttt_base_lr, of.config.head_dim
    rates = torch.empty(2, of.config.num_heads, of.num_tokens)
    for clip, head, token in itertools.product(range(2), range(of.config.num_heads), range(of.num_tokens)):
        logit = torch.dot(x[clip, token], weight[head, 0]) + bias[head, 0]
        rates[clip, head, token] = base * torch.sigmoid(logit) / head_dim / size

    origin = interleaved(of) if scenes > 1 else list(range(of.num_tokens))
    expected = torch.empty_like(eta)
    for batch in range(of.num_tokens // size):
        before = origin[batch * size + size - 1] // size
        expected[:, :, batch] = rates[:, :, before * size : before * size + size]
    torch.testing.assert_close(eta, expected, rtol=1e-5, atol=1e-8)

    by_token = rates[:, :, origin].unflatten(2, (-1, size))
    assert torch.allclose(eta, by_token, rtol=1e-5) == (scenes == 1), "the quirk has to show for more than one scene"


def test_the_scan_reads_the_scenes_one_after_the_other() -> None:
    """Every token hands the scan the same query, key and value, wherever it stands, but for its rotation."""
    of = layout(3, 9, 1, 1, mini_batch_size=4)
    x = torch.randn(1, of.num_tokens, of.config.model_dim, generator=torch.Generator().manual_seed(0))
    layer, (q, *_) = ttt_inputs_of_scan(of, x)
    with torch.no_grad():
        norms = layer.wq(x).unflatten(-1, (2, 16)).transpose(1, 2)
    # Text is not turned: it can be told apart by its values.
    text = torch.nn.functional.normalize(norms[:, :, : of.num_text_tokens], dim=-1)
    found = q.flatten(2, 3)[:, :, of.standard_order][:, :, : of.num_text_tokens]
    torch.testing.assert_close(found, text)
    places = [interleaved(of).index(scene * 9) for scene in range(3)]
    assert places == [0, 9 + 13, 9 + 13 + 9 + 12]


# Sizes that do not go together


def test_frames_and_scenes_have_to_match() -> None:
    model = DiffusionTransformer(config())
    video, text = torch.zeros(1, 13, 16, 4, 4), torch.zeros(1, 2, 8, 24)
    with refused_with(ValueError, 13, 2, 12):
        model(video, text, torch.tensor([1]))


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 7)])
def test_latents_have_to_divide_into_patches(height: int, width: int) -> None:
    model = DiffusionTransformer(config())
    with refused_with(ValueError, f"{height}x{width}", 2):
        model(torch.zeros(1, 13, 16, height, width), torch.zeros(1, 1, 8, 24), torch.tensor([1]))


def test_tokens_have_to_divide_into_mini_batches() -> None:
    model = DiffusionTransformer(config())
    with refused_with(ValueError, 60, "mini_batch_size", 16):
        model(torch.zeros(1, 13, 16, 4, 4), torch.zeros(1, 1, 8, 24), torch.tensor([1]))


@pytest.mark.parametrize("num_frames", [0, 1, 2, 4])
def test_latents_have_to_divide_into_windows(num_frames: int) -> None:
    with refused_with(ValueError, num_frames, 2):
        list(windows(num_frames, 2))


# Decoding


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    return seeded(lambda: VaeDecoder(VaeConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, temporal_levels=1)), seed=0)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(1, 16, 9, 4, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_windows_decode_the_same_whatever_comes_after_them(decoder: VaeDecoder, latents: Tensor) -> None:
    whole = list(decoder.decode(latents))
    assert [window.shape[2] for window in whole] == [5, 4, 4, 4]
    for num_frames in (3, 5, 7):
        for alone, within in zip(decoder.decode(latents[:, :, :num_frames]), whole, strict=False):
            torch.testing.assert_close(alone, within)


@torch.no_grad()
def test_decoding_goes_on_from_a_copy_of_the_cache(decoder: VaeDecoder, latents: Tensor) -> None:
    """What an engine does: each window in a run of its own, with nothing but the frames of the cache carried over."""
    scaled = latents / decoder.config.scale_factor
    carried: dict[str, Tensor] = {}
    for window, expected in zip(windows(9, 2), decoder.decode(latents), strict=True):
        cache = ConvCache({name: frames.clone() for name, frames in carried.items()})
        torch.testing.assert_close(decoder(scaled[:, :, window], cache), expected)
        carried = cache.frames
    assert {frames.shape[2] for frames in carried.values()} == {2}


@torch.no_grad()
def test_the_cache_is_what_joins_the_windows(decoder: VaeDecoder, latents: Tensor) -> None:
    _, joined, *_ = decoder.decode(latents)
    alone = decoder(latents[:, :, 3:5] / decoder.config.scale_factor, ConvCache())
    assert (joined - alone).abs().max() > 1e-3


# Names and initial weights


def expected_names(kind: TTTKind, num_layers: int) -> set[str]:
    """The state dict of the public code, without its `dit.` prefix."""
    pairs = ["time_embed.0", "time_embed.2", "patch_embedding.vid_proj", "patch_embedding.text_proj"]
    pairs += ["transformer_norm", "final_layer.adaLN_modulation.1", "final_layer.norm", "final_layer.linear"]
    single = []
    for layer in (f"layers.{index}" for index in range(num_layers)):
        pairs += [f"{layer}.{name}" for name in ("pre_seq_layernorm", "pre_seq_adaLN_modulation.1")]
        pairs += [f"{layer}.{name}" for name in ("pre_mlp_layernorm", "pre_mlp_adaLN_modulation.1")]
        pairs += [f"{layer}.mlp.layer1", f"{layer}.mlp.layer2"]
        block = f"{layer}.seq_modeling_block"
        pairs += [f"{block}.{name}" for name in ("q", "k", "v", "o", "q_norm", "k_norm")]
        single += [
            f"{block}.{way}_ssm_gating_{part}.gating_alpha"
            for way in ("forward", "backward")
            for part in ("text", "video")
        ]
        ttt = f"{block}.ssm.ttt"
        pairs += [f"{ttt}.{name}" for name in ("wq", "wk", "wv", "wo", "post_norm")]
        single += [f"{ttt}.{name}" for name in ("ttt_norm_weight", "ttt_norm_bias")]
        single += [f"{ttt}.learnable_ttt_lr_weight", f"{ttt}.learnable_ttt_lr_bias", f"{ttt}.W1", f"{ttt}.b1"]
        single += [f"{ttt}.W2", f"{ttt}.b2"] if kind == "mlp" else []
    return {*single, *(f"{name}.{part}" for name in pairs for part in ("weight", "bias"))}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_parameters_have_the_names_and_shapes_of_the_public_code(kind: TTTKind) -> None:
    model = DiffusionTransformer(config(kind))
    state = model.state_dict()
    assert set(state) == expected_names(kind, 2)
    shapes = {name: list(value.shape) for name, value in state.items()}
    block = "layers.1.seq_modeling_block"
    heads, dim, head_dim = 2, 32, 16
    hidden = 4 * head_dim if kind == "mlp" else head_dim
    expected = {
        "learnable_ttt_lr_weight": [heads, 1, dim],
        "learnable_ttt_lr_bias": [heads, 1],
        "ttt_norm_weight": [heads, head_dim],
        "ttt_norm_bias": [heads, head_dim],
        "W1": [heads, head_dim, hidden],
        "b1": [heads, 1, hidden],
    }
    expected |= {"W2": [heads, hidden, head_dim], "b2": [heads, 1, head_dim]} if kind == "mlp" else {}
    assert {name: shapes[f"{block}.ssm.ttt.{name}"] for name in expected} == expected
    assert shapes[f"{block}.backward_ssm_gating_text.gating_alpha"] == [dim]
    assert shapes["layers.0.pre_mlp_adaLN_modulation.1.weight"] == [6 * dim, 40]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_seeded_weights_depend_on_the_seed_alone(seed: int) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return seeded(lambda: DiffusionTransformer(config("mlp", num_layers=1)), seed).state_dict()

    first = weights(seed)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again, other = weights(seed), weights(seed + 1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state has to stay as it was"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["time_embed.0.weight"], other["time_embed.0.weight"])


def test_seeded_ttt_weights_are_those_of_a_fresh_layer() -> None:
    ttt: Any = seeded(lambda: DiffusionTransformer(config("mlp")), 0).get_submodule(
        "layers.0.seq_modeling_block.ssm.ttt"
    )
    for weight in (ttt.W1, ttt.W2, ttt.learnable_ttt_lr_weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert not ttt.b1.any() and not ttt.b2.any()
    assert not ttt.W1.requires_grad and not ttt.training


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_text_encoder_with_values_beyond_float16(dtype: torch.dtype, tolerance: float) -> None:
    """As trained ones have, after their feed-forwards."""
    encoder = seeded(lambda: TextEncoder(tiny("linear").text_encoder), 0)
    for name, weight in encoder.named_parameters():
        if name.endswith("wo.weight"):
            weight.mul_(1e5)
    ids = torch.randint(2000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = encoder(ids)
        found = encoder.to(dtype)(ids).float()
    assert (found - exact).norm() / exact.norm() < tolerance
