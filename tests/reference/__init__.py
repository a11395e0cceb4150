"""Each paper as a plain loop over one matrix: no engine, no batching, nothing transposed. The engine must equal it."""
