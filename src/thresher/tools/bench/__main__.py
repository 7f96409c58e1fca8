"""Time mechanisms against dense attention: `python -m thresher.bench [key=value ...]`."""

import sys
from collections.abc import Sequence

from thresher.cli.main import report_errors
from thresher.config.commands import asks_for_help, find_conf, read_help
from thresher.console import end_command


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""

    def run() -> int:
        if asks_for_help(arguments):
            print(read_help("bench"))
            return 0
        from thresher.tools.bench.command import bench

        return bench(find_conf("bench"), arguments)

    code: int = report_errors(run)
    return code


if __name__ == "__main__":
    end_command(lambda: main(sys.argv[1:]))
