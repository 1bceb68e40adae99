"""From a storyboard to an mp4, given engines: no torch, and nothing of the other rooms."""
