"""Trained networks outside of training: as files for other programs (formats.py), and run by inference engines (engines.py)."""
