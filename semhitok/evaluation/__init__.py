"""Measures of a tokenizer: fidelity of its reconstructions and use of its codes."""
