"""Check mechanisms: `python -m thresher.testing [NAME | module:Class ...]`; by default all of thresher."""

import sys
import time
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console
from rich.table import Table

from thresher.attention import Mechanism, available, find
from thresher.console import accept_any_text, end_command
from thresher.testing.contract import find_faults


def main(names: Sequence[str]) -> int:
    """Check mechanisms and print their faults; return the exit code."""
    accept_any_text()
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return 0
    console, broken = Console(soft_wrap=True), 0
    table = Table("mechanism", "promises broken", "seconds")
    try:
        chosen = {name: load(name) for name in names or available()}
    except (ValueError, ImportError, AttributeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, mechanism in chosen.items():
        start = time.monotonic()
        with console.status(f"checking {name}"):
            faults = list(find_faults(mechanism))
        for fault in faults:
            console.print(f"{name}: {fault}", markup=False, highlight=False)
        broken += bool(faults)
        table.add_row(name, str(len(faults) or "none"), f"{time.monotonic() - start:.1f}")
    console.print(table)
    return int(broken > 0)


def load(name: str) -> type[Mechanism]:
    """Load a mechanism by its name in thresher, or by `module:Class`.

    Raises:
        ValueError: There is no mechanism of that name, or the class is no mechanism.
    """
    module, colon, cls = name.partition(":")
    if not colon:
        return find(name)
    sys.path.insert(0, "")
    mechanism = getattr(import_module(module), cls)
    if not (isinstance(mechanism, type) and issubclass(mechanism, Mechanism)):
        raise ValueError(f"{name} is no mechanism: it must be a subclass of thresher.attention.Mechanism")
    return mechanism


if __name__ == "__main__":
    end_command(lambda: main(sys.argv[1:]))
