"""The parts of `examples/pretrain.py`: one file, one question."""
