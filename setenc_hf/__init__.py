"""Fine-tune and run Set-Encoders: permutation-invariant listwise passage re-rankers."""

__version__ = "0.1.0"
