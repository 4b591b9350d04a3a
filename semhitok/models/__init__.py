"""The networks: the frozen teacher, the semantic branch (VQ-KD), the pixel branch, and perceptual distances."""
