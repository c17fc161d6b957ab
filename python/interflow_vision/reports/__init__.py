"""What is read after a training: curves, contributions of branches, comparisons of networks."""
