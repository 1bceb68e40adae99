"""Renders storyboards to mp4 with the runners that it receives. Imports no torch and no other layer."""
