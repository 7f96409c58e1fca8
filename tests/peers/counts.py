"""Compare runs with and without a mechanism, apply the allow-list, and make tables."""

import csv
import io
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tests.peers.running import Outcome

START, END = "<!-- peers: the table -->", "<!-- peers: the end of the table -->"


@dataclass(frozen=True)
class Allowance:
    """A failure that stays, and why.

    Attributes:
        reason: Why, in a few words.
        test: The end of the test's name, as a shell pattern.
        error: What its message must contain; whatever it says by default.
        family: Families, as a shell pattern.
        mode: Modes, as a shell pattern.
    """

    reason: str
    test: str
    error: str = ""
    family: str = "*"
    mode: str = "*"

    def covers(self, failure: "Failure") -> bool:
        """Say whether it explains this failure."""
        return (
            fnmatchcase(failure.family, self.family)
            and fnmatchcase(failure.mode, self.mode)
            and fnmatchcase(failure.test, f"*{self.test}")
            and self.error in failure.error
        )


@dataclass(frozen=True)
class Failure:
    """A test that passes without a mechanism and does not pass with it."""

    family: str
    mode: str
    test: str
    outcome: str
    error: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Count:
    """One row of the table.

    Attributes:
        family: The family.
        mode: The mechanism.
        models: Classes of models that the mechanism was put into.
        left_dense: Classes that it could not be put into.
        passed: Tests that pass with the mechanism.
        failed_without: Tests that fail without, of those that do not pass with it.
        failed_with: Tests that fail with it.
        new: Tests that pass without and not with it.
        allowed: How many of them are explained.
    """

    family: str
    mode: str
    models: int
    left_dense: int
    passed: int
    failed_without: int
    failed_with: int
    new: int
    allowed: int


def read_allowances(path: Path) -> list[Allowance]:
    """Read an allow-list; an unknown or missing key raises TypeError."""
    return [Allowance(**entry) for entry in tomllib.loads(path.read_text()).get("allowed", [])]


def new_failures(
    family: str, mode: str, without: Outcome, with_mechanism: Outcome, allowances: Iterable[Allowance]
) -> list[Failure]:
    """Return the tests that pass without a mechanism and not with it, each with its reason if it is allowed."""
    failures = []
    for test in sorted(without.named("passed")):
        outcome = with_mechanism.outcomes.get(test, "not reached")
        if outcome != "passed":
            failure = Failure(family, mode, test, outcome, with_mechanism.errors.get(test, ""))
            reason = next((allowance.reason for allowance in allowances if allowance.covers(failure)), "")
            failures.append(Failure(**{**asdict(failure), "reason": reason}))
    return failures


def count(family: str, mode: str, without: Outcome, with_mechanism: Outcome, failures: list[Failure]) -> Count:
    """Return the row of a family and a mode."""
    return Count(
        family,
        mode,
        models=len(with_mechanism.sparsified),
        left_dense=len(set(with_mechanism.left_dense) - set(with_mechanism.sparsified)),
        passed=len(with_mechanism.named("passed")),
        failed_without=len(without.named("failed") - with_mechanism.named("passed")),
        failed_with=len(with_mechanism.named("failed")),
        new=len(failures),
        allowed=sum(bool(failure.reason) for failure in failures),
    )


def describe(row: Count) -> str:
    """Say a row in one line."""
    return (
        f"{row.family}, {row.mode}: {row.models} models, {row.passed} passed, failed {row.failed_without} without "
        f"and {row.failed_with} with, {row.new} new, {row.allowed} of them allowed"
    )


def complain(row: Count, with_mechanism: Outcome, failures: Iterable[Failure]) -> list[str]:
    """Say in one line each what is wrong: failures that no allowance covers, and a run that shows nothing."""
    where = f"{row.family}, {row.mode}:"
    lines = []
    if not row.models:
        lines.append(f"{where} the mechanism is in no model: {with_mechanism.left_dense or 'no model was built'}")
    if not row.passed:
        lines.append(f"{where} no test passes")
    for failure in failures:
        if not failure.reason:
            message = failure.error.strip().partition("\n")[0]
            lines.append(f"{where} {failure.test} {failure.outcome} {message[:200]}")
    return lines


def as_csv(rows: Iterable[Count | Failure], kind: type[Count] | type[Failure]) -> str:
    """Return rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(kind.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def as_table(counts: Iterable[Count]) -> str:
    """Return the counts as a table in Markdown, one row for each family."""
    rows: dict[str, dict[str, Count]] = {}
    for row in counts:
        rows.setdefault(row.family, {})[row.mode] = row
    modes = list(dict.fromkeys(row.mode for modes in rows.values() for row in modes.values()))
    lines = ["| family | models | failed without |" + "".join(f" `{mode}`: passed, failed, new |" for mode in modes)]
    lines.append("| --- | --- | --- |" + " --- |" * len(modes))
    for family, of_mode in rows.items():
        some = next(iter(of_mode.values()))
        cells = [family, str(some.models), str(some.failed_without)]
        for mode in modes:
            row = of_mode.get(mode)
            cells.append(f"{row.passed}, {row.failed_with}, {row.new}" if row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def explain(failures: Iterable[Failure]) -> str:
    """Return the reasons of allowed failures as a list in Markdown, with the number of tests of each."""
    reasons: dict[str, set[tuple[str, str]]] = {}
    for failure in failures:
        if failure.reason:
            reasons.setdefault(failure.reason, set()).add((failure.family, failure.test))
    return "\n".join(f"- {reason} ({_tests(len(tests))})" for reason, tests in reasons.items())


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        ValueError: The page has no such marks.
    """
    page = path.read_text()
    if page.count(START) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} needs one line {START} and one line {END}")
    before, rest = page.split(START)
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def _tests(number: int) -> str:
    return f"{number} test" + ("s" if number != 1 else "")
