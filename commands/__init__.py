"""The commands of `ttt-video`, one module each: parses options, makes one call, prints. Imported when it runs."""
