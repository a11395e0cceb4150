"""Limits on the memory of a step. Read them as `limits.NAME` at each use, so that tests can change them."""

# Bytes of gradients that are stacked into one chunk: what a step may hold beyond its largest matrix.
CHUNK_BYTES = 64 << 20
# Elements of a plain parameter that are updated at once on a CPU. Their copies and noise then stay in cache.
SLICE = 1 << 20
# Bytes of gradients whose norms are taken together on a CPU. They are then still in cache when the update reads them.
CACHE = 1 << 18
