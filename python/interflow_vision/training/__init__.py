"""Training with Lightning: the classifier, runs and their checkpoints, what ends a run early."""
