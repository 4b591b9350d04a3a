"""The networks: the frozen teacher, the semantic branch (VQ-KD) and the pixel branch."""
