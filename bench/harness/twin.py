"""Our operators in Triton as a provider beside the compiled ones."""

from dataclasses import replace
from functools import partial

from interflow_kernels import backend

from .case import Provider


def triton(provider: Provider) -> Provider:
    """The same calls, served by Triton: forward and backward, whatever backend the process was told to use."""
    return replace(provider, kind="twin", around=partial(backend, "triton"))
