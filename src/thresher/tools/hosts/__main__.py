"""Show the mechanisms of a model: `python -m thresher.hosts network=MODEL [key=value ...]`."""

import sys
from collections.abc import Sequence

from thresher.cli.main import report_errors
from thresher.config.commands import asks_for_help, find_conf, read_help
from thresher.console import end_command


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""

    def run() -> int:
        if asks_for_help(arguments):
            print(read_help("hosts"))
            return 0
        from thresher.tools.hosts.command import show_hosts

        print(show_hosts(find_conf("hosts"), arguments))
        return 0

    code: int = report_errors(run)
    return code


if __name__ == "__main__":
    end_command(lambda: main(sys.argv[1:]))
