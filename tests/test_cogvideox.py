"""Checkpoints of Hugging Face's CogVideoX: what diffusers computes, this model computes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import stock_cogvideox
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from formats import save_distributed
from messages import names, refusal, refused_with
from msgspec.structs import replace

from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.sources.cogvideox_sizes import with_stored_sizes
from ttt_video_engine.export.sources.source import CheckpointSource
from ttt_video_engine.reference.initialise import seeded
from ttt_video_engine.reference.rope import rotary_angles
from ttt_video_engine.reference.transformer import DiffusionTransformer
from ttt_video_engine.runtime.errors import CheckpointError
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.presets import preset, tiny

Run = Callable[..., tuple[int, str, str]]


def cogvideox_transformer() -> CogVideoXTransformer3DModel:
    """Of the sizes of tiny."""
    config = tiny("linear").transformer
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=16,
        out_channels=16,
        time_embed_dim=config.time_embed_dim,
        text_embed_dim=config.text_dim,
        num_layers=config.num_layers,
        sample_width=12,
        sample_height=8,
        sample_frames=49,
        max_text_seq_length=136,
        use_rotary_positional_embeddings=True,
        norm_eps=config.layer_norm_eps,
    ).eval()


def test_a_cogvideox_transformer_of_diffusers(tmp_path: Path) -> None:
    """With its gates shut, a TTT-Video of one scene is the CogVideoX that it was made from."""
    config = tiny("linear").transformer
    peer = cogvideox_transformer()
    peer.save_pretrained(tmp_path / "transformer")
    lines: list[str] = []
    transformer = CheckpointSource(tiny("linear"), tmp_path, seed=3, report=lines.append).transformer().load()
    (said,) = lines
    names(said, tmp_path / "transformer", "TTT", "seed 3")
    for name, value in transformer.state_dict().items():
        if name.endswith("gating_alpha"):
            assert (value == 0.1).all()
            value.zero_()
    video, text = torch.randn(2, 13, 16, 8, 12), torch.randn(2, 1, 136, config.text_dim)
    timestep = torch.tensor([979, 499])
    angles = rotary_angles(13, 4, 6, config.head_dim, config.rope_theta).repeat_interleave(2, dim=-1)
    with torch.no_grad():
        found = transformer(video, text, timestep)
        rotary = (angles.cos(), angles.sin())
        expected = peer(video, text[:, 0], timestep, image_rotary_emb=rotary).sample
    assert (found - expected).abs().max() < 1e-5


def test_a_cogvideox_in_shards_is_the_same_weight_file_as_the_public_codes(tmp_path: Path) -> None:
    """Its fresh TTT layers included: what trains them further stores all of it under the public code's names."""

    peer, public = tmp_path / "cogvideox", tmp_path / "public"
    cogvideox_transformer().save_pretrained(peer / "transformer", max_shard_size="200KB")
    assert len(list((peer / "transformer").glob("*.safetensors"))) > 2
    state = CheckpointSource(tiny("linear"), peer, seed=3).transformer().load().state_dict()
    (public / "transformer").mkdir(parents=True)
    save_distributed({f"dit.{name}": value for name, value in state.items()}, public / "transformer")

    digests = set()
    for folder in (peer, public):
        transformer = CheckpointSource(tiny("linear"), folder, seed=3).transformer().load()
        digests.add(sha256_of(write_module(transformer, folder / "model.onnx_data").path))
    assert len(digests) == 1


def test_a_cogvideox_vae_of_diffusers(tmp_path: Path) -> None:
    config = tiny("linear").vae
    torch.manual_seed(0)
    peer = AutoencoderKLCogVideoX(
        block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=16,
        layers_per_block=config.num_res_blocks,
        sample_height=64,
        sample_width=96,
    ).eval()
    peer.save_pretrained(tmp_path / "vae")
    decoder = CheckpointSource(tiny("linear"), tmp_path).vae_decoder().load()
    latents = torch.randn(1, 16, 5, 8, 12)
    with torch.no_grad():
        found = torch.cat(list(decoder.decode(latents * config.scale_factor)), dim=2)
        expected = peer.decode(latents).sample
    assert (found - expected).abs().max() < 1e-4


# Without TTT


@pytest.mark.parametrize(("width", "height", "scale"), [(12, 8, 0.01), (20, 8, 1), (8, 12, 1), (6, 16, 1)])
def test_a_transformer_without_ttt_at_any_size(tmp_path: Path, width: int, height: int, scale: float) -> None:
    """Trained for 12x8. Its rotary positions are those that diffusers' pipeline hands it.

    `scale` is of what its norms read: where that is small, their epsilons matter.
    """
    peer = stock_cogvideox.transformer(sample_width=12, sample_height=8)
    with torch.no_grad():
        for name, value in peer.named_parameters():
            if name.startswith("patch_embed") or ".to_q." in name or ".to_k." in name:
                value.mul_(scale)
    peer.save_pretrained(tmp_path / "transformer")
    model = with_stored_sizes(tmp_path, replace(tiny("none"), width=8 * width, height=8 * height))
    transformer = CheckpointSource(model, tmp_path).transformer().load()
    pipeline = CogVideoXPipeline(None, None, None, peer, None)
    pipeline.vae_scale_factor_spatial = 8
    rotary = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, 13, torch.device("cpu"))
    video, text = torch.randn(2, 13, 16, height, width), torch.randn(2, 1, 30, 64)
    timestep = torch.tensor([979, 499])
    with torch.no_grad():
        found = transformer(video, text, timestep)
        expected = peer(video, text[:, 0], timestep, image_rotary_emb=rotary).sample
    assert (found - expected).abs().max() < 5e-5 * expected.abs().max()


def test_without_ttt_is_with_shut_gates() -> None:
    """Of several scenes: attention is within each, as in the model with TTT."""
    config = tiny("linear").transformer
    whole = seeded(lambda: DiffusionTransformer(config), 0)
    for name, value in whole.named_parameters():
        if name.endswith("gating_alpha"):
            value.zero_()
    part = DiffusionTransformer(replace(config, ttt="none", mini_batch_size=1))
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in part.state_dict()})
    video, text, timestep = torch.randn(1, 37, 16, 4, 8), torch.randn(1, 3, 24, config.text_dim), torch.tensor([499])
    with torch.no_grad():
        torch.testing.assert_close(part(video, text, timestep), whole(video, text, timestep))
        changed = torch.cat([text[:, :2], torch.randn(1, 1, 24, config.text_dim)], dim=1)
        difference = (part(video, changed, timestep) - part(video, text, timestep)).abs().amax(dim=(0, 2, 3, 4))
    # The last scene's text reaches its own frames, and in two layers the segment that shares a frame with it.
    assert (difference[:12] == 0).all() and (difference[12:] > 0).all()


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """The config files of CogVideoX-5B, with the values that matter here, and no weights."""
    transformer = {
        "num_attention_heads": 48,
        "attention_head_dim": 64,
        "num_layers": 42,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "text_embed_dim": 4096,
        "time_embed_dim": 512,
        "max_text_seq_length": 226,
        "sample_width": 90,
        "sample_height": 60,
        "norm_eps": 1e-5,
        "use_rotary_positional_embeddings": True,
    }
    vae = {"block_out_channels": [128, 256, 256, 512], "layers_per_block": 3, "latent_channels": 16}
    text = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    files = {
        "transformer/config.json": transformer,
        "vae/config.json": {**vae, "scaling_factor": 0.7},
        "text_encoder/config.json": {**text, "feed_forward_proj": "gated-gelu", "vocab_size": 32128},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    stock_cogvideox.scheduler().save_pretrained(tmp_path / "scheduler")
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_published_files_are_the_preset(stock: Path) -> None:
    """But for the size of the vocabulary, which is the tokenizer's."""
    small = replace(tiny("none"), text_encoder=replace(tiny("none").text_encoder, vocab_size=32_102))
    assert with_stored_sizes(stock, small) == replace(preset("5B", "none"), name="CogVideoX")
    assert preset("5B", "none").clip_size("3s").num_tokens(2) == 17_776


def test_a_folder_without_config_files_keeps_the_model(tmp_path: Path) -> None:
    assert with_stored_sizes(tmp_path, preset("5B", "none")) == preset("5B", "none")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("transformer/config.json", {"use_rotary_positional_embeddings": False}),  # CogVideoX-2B
        ("transformer/config.json", {"patch_size_t": 2}),  # CogVideoX1.5
        ("transformer/config.json", {"use_learned_positional_embeddings": True}),  # image to video
        ("transformer/config.json", {"sample_frames": 81}),
        ("transformer/config.json", {"in_channels": 32}),
        ("transformer/config.json", {"num_attention_heads": 0}),
        ("transformer/config.json", {"patch_size": 0}),
        ("transformer/config.json", {"num_layers": "42"}),
        ("vae/config.json", {"block_out_channels": []}),
        ("vae/config.json", {"block_out_channels": [128, 200]}),
        ("vae/config.json", {"norm_num_groups": 16}),
        ("text_encoder/config.json", {"feed_forward_proj": "relu"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "leading"}),
        ("scheduler/scheduler_config.json", {"snr_shift_scale": 0}),
    ],
)
def test_another_model_is_refused(run: Run, stock: Path, file: str, values: dict[str, object]) -> None:
    change(stock / file, **values)
    for command in (("export", "--output", stock / "bundle"), ("plan",)):
        line = refusal(run(*command, "--ttt", "none", "--checkpoint", stock))
        names(line, stock / file)
    assert not (stock / "bundle").exists()


def test_a_file_that_says_too_little_is_refused(stock: Path) -> None:
    (stock / "transformer/config.json").write_text("{}")
    with refused_with(CheckpointError, stock / "transformer/config.json", "use_rotary_positional_embeddings"):
        with_stored_sizes(stock, tiny("none"))
    (stock / "transformer/config.json").write_text('{"use_rotary_positional_embeddings": true}')
    with refused_with(CheckpointError, stock / "transformer/config.json", "num_attention_heads"):
        with_stored_sizes(stock, tiny("none"))
    (stock / "transformer/config.json").write_text("[")
    with refused_with(CheckpointError, stock / "transformer/config.json"):
        with_stored_sizes(stock, tiny("none"))


def test_weights_with_ttt_are_refused_without(tmp_path: Path) -> None:
    state = seeded(lambda: DiffusionTransformer(tiny("linear").transformer), 0).state_dict()
    (tmp_path / "transformer").mkdir()
    torch.save(state, tmp_path / "transformer/model.pt")
    with refused_with(CheckpointError, tmp_path / "transformer", "linear", "none", "--ttt linear"):
        CheckpointSource(tiny("none"), tmp_path).transformer()
