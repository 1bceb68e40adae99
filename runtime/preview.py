"""One frame of each scene of a video that is still being denoised."""

import numpy as np
from numpy.typing import NDArray

from ttt_video_engine.runtime.bundle import VAE_FIRST, Bundle
from ttt_video_engine.runtime.stages import Load
from ttt_video_engine.runtime.video import to_frames


def preview_frames(bundle: Bundle, load: Load, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames [S, H, W, 3] from the middle of every scene of denoised latents [1, T, C, h, w].

    An approximation: each comes from the graph of the first window, given a few latent frames from the middle of a
    scene, so that the decoder lacks what the windows before would have handed on. The last frame of the window is
    taken, since it has the most before it. Raises OutputError where a value is NaN or infinite.
    """
    model = bundle.manifest.model
    scene, window = model.transformer.attn_length, 1 + model.vae.temporal_window
    prefix = model.transformer.prefix_temporal_length
    num_scenes = (latents.shape[1] - prefix) // scene
    frames = []
    with load(VAE_FIRST) as runner:
        for index in range(num_scenes):
            middle = prefix + scene * index + scene // 2
            start = min(max(0, middle - window // 2), latents.shape[1] - window)
            outputs = runner.run({"latents": latents[:, start : start + window]})
            frames.append(to_frames(np.asarray(outputs["frames"], np.float32))[-1])
    return np.stack(frames)
