"""What `make gpu` does on a machine with a GPU, in parts of at most 200 seconds. `python -m gpu --help`, with bench/ in PYTHONPATH, lists them."""
