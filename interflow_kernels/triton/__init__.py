"""The operators in Triton: GPUs of any maker, from the same sources, nothing compiled at install time. Imported only where asked for."""
