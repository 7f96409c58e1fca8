"""`python -m tests.peers FOLDER`: run transformers' and timm's own tests over models that hold a mechanism."""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import version
from pathlib import Path

from tests.peers import counts, running, sources
from tests.peers.families import FAMILIES, Family

ALLOWED = Path(__file__).parent / "allowed.toml"
DOCS = running.REPOSITORY / "docs" / "peers.md"
FIRST_GUESS = 180.0  # seconds for a run, before any was timed


class Runs:
    """Runs families in modes, keeps what was run, and tells how long the rest takes.

    Args:
        options: The command's.
        roots: The folder of tests of each library.
        number: How many outcomes will be asked for.
    """

    def __init__(self, options: argparse.Namespace, roots: dict[str, Path], number: int) -> None:
        self.options = options
        self.roots = roots
        self.left = number
        self.seconds: list[float] = []
        self.source = hash_of(running.REPOSITORY / "src" / "thresher", running.INSIDE)
        self.suite = hash_of(running.INSIDE / "peers_suite.py")

    def without(self, family: Family, others: Collection[running.Outcome]) -> running.Outcome:
        """Return how tests that do not pass with a mechanism end without; all tests if a run was stopped."""
        if any(other.stopped for other in others):
            return self.outcome(family, running.WITHOUT)
        suspects = {test for other in others for test in set(other.outcomes) - other.named("passed")}
        return self.outcome(family, running.WITHOUT, suspects) if suspects else running.Outcome()

    def outcome(self, family: Family, mode: str, tests: Collection[str] = ()) -> running.Outcome:
        """Return how tests of `family` end in `mode`, all by default: kept from an earlier run, or run now."""
        folder = self.options.out / family.name
        stamp = self._stamp(family, mode)
        outcome = None if self.options.again else running.load(folder / f"{mode}.json", stamp)
        if outcome is None or not outcome.holds(tests):
            self._tell(family, mode, 0)
            outcome = running.run(
                family,
                mode,
                self.roots[family.library],
                folder / f"{mode}.jsonl",
                tests=tests,
                timeout=self.options.timeout,
                test_timeout=self.options.test_timeout,
                progress=lambda begun: self._tell(family, mode, begun) if begun else None,
            )
            running.save(outcome, folder / f"{mode}.json", stamp)
            self.seconds.append(outcome.seconds)
        self.left -= 1
        return outcome

    def _stamp(self, family: Family, mode: str) -> dict[str, str]:
        stamp = {name: version(name) for name in (family.library, "torch", "pytest")}
        stamp |= {"tests": str(self.roots[family.library]), "parts": ",".join(family.models + family.cases)}
        stamp |= {"suite": self.suite} if family.cases else {}
        return stamp if mode == running.WITHOUT else stamp | {"source": self.source}

    def _tell(self, family: Family, mode: str, begun: int) -> None:
        usual = sum(self.seconds) / len(self.seconds) if self.seconds else FIRST_GUESS
        line = f"{family.name}, {mode}: {begun} tests; {self.left} runs left, about {self.left * usual / 60:.0f} min"
        if sys.stderr.isatty():
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
        elif not begun:
            print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None, families: dict[str, Family] = FAMILIES) -> int:
    """Run what is asked for, print and write the counts, and return the exit status.

    Returns:
        0 if every new failure is allowed, 1 if one is not or a mechanism is in no model, 2 if there are no tests.
    """
    options = _parser(families).parse_args(arguments)
    asked = [families[name] for name in options.only]
    try:
        roots = _prepare(asked, options.out, dict(options.tests))
    except sources.NoTests as error:
        print(error, file=sys.stderr)
        return 2
    allowances = counts.read_allowances(options.allowed)
    runs = Runs(options, roots, len(asked) * (1 + len(options.modes)))
    rows: list[counts.Count] = []
    failures: list[counts.Failure] = []
    problems: list[str] = []
    for family in asked:
        outcomes = {mode: runs.outcome(family, mode) for mode in options.modes}
        without = runs.without(family, outcomes.values())
        for mode, outcome in outcomes.items():
            new = counts.new_failures(family.name, mode, without, outcome, allowances)
            row = counts.count(family.name, mode, without, outcome, new)
            print(f"\r{counts.describe(row)} {outcome.stopped}", flush=True)
            problems += counts.complain(row, outcome, new)
            rows.append(row)
            failures += new
    report = f"{counts.as_table(rows)}\n\n{counts.explain(failures)}"
    print(f"\n{report}")
    (options.out / "counts.csv").write_text(counts.as_csv(rows, counts.Count))
    (options.out / "failures.csv").write_text(counts.as_csv(failures, counts.Failure))
    if options.write_docs:
        counts.write_between(DOCS, f"{_measured(asked)}\n\n{report}")
    if problems:
        print(f"\n{len(problems)} not explained by {options.allowed}:", *problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


def hash_of(*places: Path) -> str:
    """Return a hash of source files, or of those in folders."""
    digest = hashlib.sha256()
    for place in places:
        files = sorted(path for path in place.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
        for path in files if place.is_dir() else [place]:
            digest.update(str(path.relative_to(place)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _prepare(families: list[Family], out: Path, given: dict[str, Path]) -> dict[str, Path]:
    out.mkdir(parents=True, exist_ok=True)
    libraries = dict.fromkeys(family.library for family in families)
    roots = {library: sources.root_of(library, out, given.get(library)) for library in libraries}
    for family in families:
        sources.complete(roots[family.library], family)
    return roots


def _measured(families: list[Family]) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=running.REPOSITORY, capture_output=True, text=True, check=True
    )
    libraries = dict.fromkeys([*(family.library for family in families), "torch"])
    return f"Measured at {commit.stdout.strip()} with {', '.join(f'{name} {version(name)}' for name in libraries)}."


def _parser(families: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("out", type=Path, help="folder for the libraries' tests, the logs and the tables; a second run goes on there")
    add(
        "--only",
        type=_some_of(families),
        default=[*families],
        help=f"families, parted by commas: {', '.join(families)}",
    )
    add("--modes", type=_some_of(running.MODES), default=[*running.MODES], help=f"of {', '.join(running.MODES)}")
    add("--tests", type=_library_and_path, action="append", default=[], metavar="LIBRARY=PATH",
        help="a checkout of the installed version; by default its source distribution is fetched")  # fmt: skip
    add("--allowed", type=Path, default=ALLOWED, help="the list of failures that stay")
    add("--timeout", type=float, default=3600, help="seconds for a family in a mode")
    add("--test-timeout", type=float, default=300, help="seconds for a test")
    add("--again", action="store_true", help="run what was run before, too")
    add("--write-docs", action="store_true", help=f"write the table to {DOCS.relative_to(running.REPOSITORY)}")
    return parser


def _some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return names

    return parse


def _library_and_path(text: str) -> tuple[str, Path]:
    library, _, path = text.partition("=")
    if library not in ("transformers", "timm") or not Path(path).is_dir() or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not transformers=FOLDER or timm=FOLDER")
    return library, Path(path)


if __name__ == "__main__":
    sys.exit(main())
