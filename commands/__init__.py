"""The commands of `ttt-video`, one module each: parse, one call, print. A module is imported when its command runs."""
