"""The command `interflow`: fit, validate, test and predict; what a user can mend is one sentence and exit code 2."""

import sys

from .errors import UserError


def main() -> int:
    """Runs the command with the process's arguments; returns 0, or 2 after one sentence on stderr."""
    try:
        try:
            if sys.argv[1:2] == ["predict"]:
                from . import predict

                predict.main(sys.argv[2:])
            else:
                from . import training

                training.run()
        except ModuleNotFoundError as error:
            package = error.name or "jsonargparse[signatures]"  # LightningCLI names no module when it misses this one
            raise UserError(f'the command needs the package {package}, which is not installed: pip install "interflow-kernels[train]"') from error
    except UserError as error:
        print(f"interflow: {error}", file=sys.stderr)
        return 2
    return 0
