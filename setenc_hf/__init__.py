"""Fine-tune and run Set-Encoders: permutation-invariant listwise passage re-rankers."""
