"""Teaches the text encoder to spread what a caption says: `python -m demo.train_text --output DIR`, once, in a minute.

Every token's embedding is to tell figure, colour, place, time of day and motion. A large model's T5 comes trained; this
one learned from the velocity alone that colours and places matter, and never that motions do. It works on the state of
`demo.train_transformer` in DIR, or makes it; that training is resumed with the new weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo.backgrounds import PLACES
from demo.captions import captions
from demo.command_line import training_folders
from demo.config import MODEL
from demo.data import prompt_ids
from demo.figures import COLOURS, FIGURES
from demo.rates import warm_up
from demo.story import MOTIONS, SceneScript, random_script
from demo.train_transformer import SEED, Training
from ttt_video_engine.reference.text_encoder import TextEncoder

_STEPS, _CLIPS, _SCENES = 1500, 24, 3
_SEED = 2
_RATE = 1e-3
_KEEP = 0.1
"""Weight of staying near the embeddings as they were: what the transformer reads already stays readable."""
_HEADS = {
    "figure": len(FIGURES) + 1,
    "colour": len(COLOURS) + 1,
    "place": len(PLACES) + 1,
    "night": 3,
    "motion": len(MOTIONS),
}
"""Classes of each; all but the motion may be unsaid."""


class Heads(nn.Module):
    """Embeddings [..., D] → logits [..., K] of everything that a caption says. Needed while training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(_HEADS.values()))

    def loss(self, embeddings: Tensor, answers: Tensor) -> Tensor:
        """Mean cross-entropy over tokens and questions; embeddings [B, N, D], answers [B, Q]."""
        logits = self.linear(embeddings).split(list(_HEADS.values()), dim=-1)
        each = [
            functional.cross_entropy(of_one.flatten(0, 1), answer.repeat_interleave(of_one.shape[1]))
            for of_one, answer in zip(logits, answers.unbind(1), strict=True)
        ]
        return torch.stack(each).mean()


def answers(scene: SceneScript, caption: str) -> list[int]:
    """The class of each of `_HEADS`; the last class for what the caption does not say."""
    words = caption.lower().rstrip(".").replace(",", "").split()
    has_place = scene.cut or scene.new_figure
    return [
        FIGURES.index(scene.figure) if scene.figure in words else len(FIGURES),
        list(COLOURS).index(scene.colour) if scene.colour in words else len(COLOURS),
        PLACES.index(scene.place) if has_place else len(PLACES),
        int(scene.night) if has_place else 2,
        MOTIONS.index(scene.motion),
    ]


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids [B, N] and answers [B, Q] of the captions of one step."""
    ids, said = [], []
    for number in range(step * _CLIPS, (step + 1) * _CLIPS):
        script = random_script(_SEED, number, _SCENES)
        ids.append(torch.from_numpy(prompt_ids(script, number)[0]))
        said += [answers(*pair) for pair in zip(script, captions(script, number), strict=True)]
    return torch.cat(ids), torch.tensor(said)


def teach(encoder: TextEncoder, num_steps: int) -> list[float]:
    """Trains the encoder in place; the losses of all steps."""
    before = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    torch.manual_seed(_SEED)
    heads = Heads(MODEL.text_encoder.d_model)
    weights = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0)
    losses = []
    for step in range(num_steps):
        ids, said = make_batch(step)
        with torch.no_grad():
            old = torch.func.functional_call(encoder, before, (ids,))
        embeddings = encoder(ids)
        loss = heads.loss(embeddings, said)
        (loss + _KEEP * functional.mse_loss(embeddings, old)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = _RATE * warm_up(step, 0) * min(1.0, 4 * (1 - step / num_steps))
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    return losses


def main() -> None:
    folders = training_folders(__doc__)
    torch.set_num_threads(1)
    training, state = Training(SEED), folders.output / "transformer.pt"
    if state.is_file():
        training.load(state)
    elif folders.start_from is not None:
        training.start_from(folders.start_from)
    teach(training.model.text_encoder, _STEPS)
    for name, value in training.model.text_encoder.named_parameters(prefix="text_encoder"):
        training.average.weights[name] = value.detach().clone()
    training.save(state)


if __name__ == "__main__":
    main()
