"""The operators in Triton: GPUs of any maker, from the same sources, nothing compiled at install time. Imported only where asked for.

A folder for each operator, with the host side in forward.py and backward.py; common/ has what they share, tiles the sizes of tiles.
registration serves the operators' calls and imports a folder at its first call; tune is a program.
"""
