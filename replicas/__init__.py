"""Many processes on many machines: object stores in place of a common disk, and a queue that Ray's actors work on."""
