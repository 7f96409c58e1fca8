"""Begin or resume a sweep: `python -m thresher.sweep [key=value ...] [-- overrides of train.py]`."""

import sys
from collections.abc import Sequence

from thresher.cli.main import report_errors
from thresher.config.commands import asks_for_help, find_conf, read_help
from thresher.console import end_command


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, last = list(arguments[:split]), list(arguments[split + 1 :])

    def run() -> int:
        if not arguments or asks_for_help(own):
            print(read_help("sweep"))
            return 0
        from thresher.tools.sweep.command import sweep

        return sweep(find_conf("sweep").parent, own, last)

    code: int = report_errors(run)
    return code


if __name__ == "__main__":
    end_command(lambda: main(sys.argv[1:]))
