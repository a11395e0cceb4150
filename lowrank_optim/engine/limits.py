"""Limits on what a step holds at once. Read at each use, as `limits.NAME`, so that tests can change them."""

CHUNK_BYTES = 64 << 20  # of gradients stacked at once: what a step may hold beyond one matrix
SLICE = 1 << 20  # elements of a plain parameter updated at once on CPU, where copies and noise then stay in cache
CACHE = 1 << 18  # bytes of gradients looked at together on CPU: what stays in cache until they are used
