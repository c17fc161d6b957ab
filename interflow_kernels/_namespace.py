"""The namespace of the operators: torch.ops.<NAMESPACE>. This line alone fixes it; setup.py compiles it into the libraries.

A copy of the package with another name here, built anew, lives beside the installed one in one process: bench/hub.py makes such copies.
"""

NAMESPACE = "interflow_kernels"
