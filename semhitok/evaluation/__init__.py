"""Evaluation of a tokenizer: fidelity of its reconstructions, use of its codes, and what its features know."""

from semhitok.evaluation.protocol import evaluate_reconstructions, evaluate_tokenizer

__all__ = ["evaluate_reconstructions", "evaluate_tokenizer"]
