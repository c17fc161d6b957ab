"""The command `interflow`: fit, validate, test, predict and report."""

import sys

from ..errors import UserError
from . import guard

COMMANDS = {
    "fit": "trains a model, tests the best checkpoint and draws the curves",
    "validate": "evaluates a checkpoint on the validation images",
    "test": "evaluates a checkpoint on the test images",
    "predict": "classifies image files: class and probability",
    "compare": "trains arms, seeds, data sets and networks of a study, and makes a page of the results",
    "export": "writes a checkpoint as a file for another program: torch.export, AOTInductor, TorchScript, ONNX, OpenVINO",
    "report": "writes an HTML page about one or several runs",
}

HELP = f"""usage: interflow {{{",".join(COMMANDS)}}} [options]

Trains, tests and uses image classifiers with Interflow heads.

{chr(10).join(f"  {name:<11}{does}" for name, does in COMMANDS.items())}

  -h, --help   this; `interflow fit --help` for the options of a subcommand
  --version    of the package, and of torch

`interflow fit` alone trains on scikit-learn's digits, in half a minute.
Exit codes: 0 done, 1 some images (or runs) could not be evaluated, 2 something that was given does not fit (one line on stderr says what),
70 a fault of the package, 130 Ctrl-C, 143 SIGTERM.
"""


def main() -> int:
    """Runs the command with the process's arguments; returns the exit code, see HELP."""
    return guard.run(_command, "interflow")


def _command() -> int | None:
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in ("-h", "--help"):
        print(HELP, end="")
    elif first == "--version":
        print(_version())
    elif first == "predict":
        from . import predict

        return predict.main(sys.argv[2:])
    elif first == "compare":
        from . import compare

        return compare.main(sys.argv[2:])
    elif first == "export":
        from . import export

        return export.main(sys.argv[2:])
    elif first == "report":
        from . import report

        return report.main(sys.argv[2:])
    elif not first:
        raise UserError(f"give a subcommand: {', '.join(COMMANDS)}; `interflow --help` says more")
    elif first not in COMMANDS and not first.startswith("-"):
        raise UserError(f"there is no subcommand {first!r}: give {', '.join(COMMANDS)}; `interflow --help` says more")
    else:
        from . import fit

        fit.run()
    return None


def _version() -> str:
    import torch

    from interflow_kernels import __version__

    return f"interflow-kernels {__version__}, torch {torch.__version__}"
