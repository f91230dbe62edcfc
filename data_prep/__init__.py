"""Make training data: first-stage runs, teacher runs, listwise samples."""
