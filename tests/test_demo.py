"""The demo's data, judge and training; the model that came out of it is not needed."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from demo import train_text, train_transformer, train_vae
from demo.backgrounds import PLACES
from demo.captions import captions
from demo.config import MODEL
from demo.data import HELD_OUT_SEED, figure_cells, make_batch, text_length
from demo.encoder import LinearEncoder
from demo.export_checkpoint import export_checkpoint
from demo.fast import COMPILED, plain_attention
from demo.figures import FIGURES
from demo.judge import judge
from demo.model import new_model
from demo.noise import add_noise, alpha_table, draw_timesteps
from demo.scan import mini_batch, scan
from demo.scenes import Frames, background_frames, render, render_part
from demo.story import MOTIONS, Script, random_script
from demo.text import FOLDER, num_lost, storyboard, train
from ttt_video_engine.reference.ttt import ttt_linear
from ttt_video_engine.runtime.config import SCENES_PER_LENGTH
from ttt_video_engine.runtime.config_file import resolve_config

_SMALL = replace(
    MODEL,
    transformer=replace(MODEL.transformer, model_dim=32, num_heads=2, num_layers=1, text_dim=32, time_embed_dim=16),
    text_encoder=replace(MODEL.text_encoder, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
)
_STAGES = (train_transformer.Stage(3, ((1, 2),)), train_transformer.Stage(6, ((3, 1), (1, 2))))


@pytest.fixture(scope="module")
def held_out() -> list[tuple[Script, list[str], Frames]]:
    scripts = [random_script(HELD_OUT_SEED, number, 3) for number in range(12)]
    return [(script, captions(script, number), render(script)) for number, script in enumerate(scripts)]


def test_a_clip_is_a_function_of_seed_and_number() -> None:
    first, second = (render(random_script(3, 5, 3)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, render(random_script(3, 6, 3)))
    assert first.shape == (145, 64, 96, 3)
    assert np.array_equal(render_part(random_script(3, 5, 3), 40, 17), first[40:57])


def test_scenes_without_a_cut_go_on() -> None:
    scripts = [random_script(0, number, 6) for number in range(50)]
    pairs = [pair for script in scripts for pair in itertools.pairwise(script)]
    for before, after in pairs:
        if not after.cut:
            assert after.start == before.end
            assert (after.figure, after.colour) == (before.figure, before.colour)
        assert ((after.place, after.night) != (before.place, before.night)) == after.cut
    assert {after.cut for _, after in pairs} == {True, False}


@pytest.mark.parametrize("length", SCENES_PER_LENGTH)
def test_captions_fit(length: str) -> None:
    for number in range(20):
        script = random_script(HELD_OUT_SEED, number, SCENES_PER_LENGTH[length])
        story = storyboard(script, captions(script, number))
        assert num_lost(story, text_length(SCENES_PER_LENGTH[length])) == 0


def test_later_captions_leave_out_what_earlier_ones_said(held_out: list[tuple[Script, list[str], Frames]]) -> None:
    later = [text.lower() for _, texts, _ in held_out for text in texts[1:]]
    assert sum("it " in text or "the figure" in text for text in later) > len(later) / 3


def test_the_tokenizer_is_the_one_that_the_prose_makes() -> None:
    assert train() == (FOLDER / "tokenizer.json").read_text(encoding="utf-8")


def test_the_config_file_states_the_model() -> None:
    config = resolve_config(Path(__file__).parents[1] / "demo" / "demo.toml")
    assert replace(config.model, name="demo") == MODEL


def test_latents_keep_what_the_judge_looks_for(held_out: list[tuple[Script, list[str], Frames]]) -> None:
    encoder = LinearEncoder.load()
    rebuilt = [(script, texts, encoder.decode(encoder.encode(frames))) for script, texts, frames in held_out]
    assert min(vars(judge(rebuilt)).values()) >= 0.97


def test_the_judge_tells_right_from_wrong(held_out: list[tuple[Script, list[str], Frames]]) -> None:
    assert min(vars(judge(held_out)).values()) >= 0.99
    others = [*held_out[1:], held_out[0]]
    shuffled = judge(
        (script, texts, frames) for (script, texts, _), (_, _, frames) in zip(held_out, others, strict=True)
    )
    assert shuffled.background < 0.3
    assert max(shuffled.direction, shuffled.figure, shuffled.colour) < 0.45


def test_the_scan_and_attention_of_training_are_those_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    streams = [normal(2, 3, 5, 16, 32) for _ in range(3)]
    rest = [
        normal(2, 3, 5, 16).sigmoid() / 512,
        normal(3, 32),
        normal(3, 32),
        0.1 * normal(3, 32, 32),
        normal(3, 1, 32),
    ]
    torch.testing.assert_close(scan(mini_batch, *streams, *rest), ttt_linear(*streams, *rest), atol=1e-5, rtol=1e-5)
    q, k, v = streams[0].flatten(1, 2), streams[1].flatten(1, 2), streams[2].flatten(1, 2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(plain_attention(q, k, v), wanted, atol=1e-5, rtol=1e-5)


def test_what_training_compiles_is_there() -> None:
    assert all(callable(vars(place)[name]) for place, name in COMPILED)


def test_training_noises_down_to_noise_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.ones(2, 3)
    noised, velocity = add_noise(clean, torch.tensor([999, 0]), alpha_table(), generator)
    assert torch.equal(velocity[0], -clean[0])
    assert (noised[1] - clean[1]).abs().max() < 0.2
    drawn = torch.cat([draw_timesteps(8, 650, 0.5, generator) for _ in range(200)])
    assert drawn.min() >= 0 and drawn.max() == 999
    assert 0.6 < (drawn >= 650).double().mean() < 0.75


def test_where_a_figure_is_latents_are_not_those_of_the_background() -> None:
    script = random_script(0, 5, 3)
    encoder, frames = LinearEncoder.load(), render(script)
    changed = np.abs(encoder.encode(frames) - encoder.encode(background_frames(script))).max(1, keepdims=True) > 1e-4
    cells = figure_cells(script, frames)
    assert np.array_equal(changed, cells) and 0.05 < cells.mean() < 0.6


def test_a_new_model_predicts_no_velocity() -> None:
    batch = make_batch(0, 0, 1, 1)
    assert not new_model(0, _SMALL)(batch.latents, batch.ids, torch.tensor([500])).any()


def test_the_same_seed_trains_alike() -> None:
    runs = [_losses(train_transformer.Training(seed, _STAGES, _SMALL), 4) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_training_goes_on_bit_by_bit(tmp_path: Path) -> None:
    whole = train_transformer.Training(0, _STAGES, _SMALL)
    _losses(whole, 6)
    assert whole.finished
    first = train_transformer.Training(0, _STAGES, _SMALL)
    _losses(first, 2)
    first.save(tmp_path / "transformer.pt")
    second = train_transformer.Training(0, _STAGES, _SMALL)
    second.load(tmp_path / "transformer.pt")
    _losses(second, 4)
    _assert_same(whole.model.state_dict(), second.model.state_dict())
    _assert_same(whole.average.weights, second.average.weights)


def test_training_of_the_decoder_goes_on_bit_by_bit(tmp_path: Path) -> None:
    stages = (train_vae.Stage(2, 16, 16, 1), train_vae.Stage(3, 24, 16, 1))
    whole = train_vae.Training(0, stages)
    _losses(whole, 3)
    first = train_vae.Training(0, stages)
    _losses(first, 1)
    first.save(tmp_path / "vae.pt")
    second = train_vae.Training(0, stages)
    second.load(tmp_path / "vae.pt")
    _losses(second, 2)
    _assert_same(whole.model.state_dict(), second.model.state_dict())


def test_published_weights_start_a_training(tmp_path: Path) -> None:
    first = train_transformer.Training(0, _STAGES, _SMALL)
    decoder = train_vae.Training(0, (train_vae.Stage(2, 16, 16, 1),))
    _losses(first, 2)
    first.save(tmp_path / "transformer.pt")
    decoder.save(tmp_path / "vae.pt")
    export_checkpoint(tmp_path, tmp_path / "checkpoint")
    second = train_transformer.Training(1, _STAGES, _SMALL)
    second.start_from(tmp_path / "checkpoint")
    assert second.num_done == 2
    for name, value in second.model.named_parameters():
        assert torch.equal(value, first.average.weights[name].half().float())
    other_decoder = train_vae.Training(1, (train_vae.Stage(2, 16, 16, 1),))
    other_decoder.start_from(tmp_path / "checkpoint")
    _assert_same(other_decoder.average.weights, {n: v.half().float() for n, v in decoder.average.weights.items()})


def _losses(training: train_transformer.Training | train_vae.Training, count: int) -> Sequence[object]:
    return [training.advance() for _ in range(count)]


def _assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_text_encoder_learns_what_captions_say() -> None:
    encoder = new_model(0).text_encoder
    before = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    losses = train_text.teach(encoder, num_steps=40)
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(value, before[name]) for name, value in encoder.named_parameters() if value.dim() == 2)


def test_what_a_caption_leaves_out_is_no_answer(held_out: list[tuple[Script, list[str], Frames]]) -> None:
    for script, sentences, _ in held_out:
        for scene, sentence in zip(script, sentences, strict=True):
            figure, colour, place, night, motion = train_text.answers(scene, sentence)
            assert (figure < len(FIGURES)) == (scene.figure in sentence) and (colour < 6) == (scene.colour in sentence)
            assert motion == MOTIONS.index(scene.motion) and (night < 2) == (place < len(PLACES))
