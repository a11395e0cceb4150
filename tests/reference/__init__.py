"""Each paper as a plain loop over one matrix: no engine, no batching, nothing turned. What the engine must equal."""
