"""Checkpoints of Hugging Face's CogVideoX: what diffusers computes, this model computes."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from formats import save_distributed
from messages import names

from ttt_video_engine.export.graphs.weights import write_module
from ttt_video_engine.export.sources.source import CheckpointSource
from ttt_video_engine.reference.rope import rotary_angles
from ttt_video_engine.runtime.files import sha256_of
from ttt_video_engine.runtime.presets import tiny


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
