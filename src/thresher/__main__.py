"""List the commands: `python -m thresher`."""

from thresher import __version__
from thresher.console import accept_any_text, end_command

SCRIPTS = {
    "python train.py": "train a network with sparse attention; --help lists its options",
    "python eval.py": "evaluate a checkpoint, or drop mechanisms into a trained network",
}
MODULES = {
    "sweep": "run many trainings, resume them, share them between machines",
    "report": "compare runs: Pareto fronts, heads and curves in one page",
    "export": "write a trained network as files for use elsewhere",
    "bench": "time mechanisms against dense attention on this machine",
    "doctor": "inspect this machine, and test the masks of a model for leaks",
    "testing": "check mechanisms, your own included: outputs, gradients, costs, leaks",
    "attention": "print the table of mechanisms",
    "hosts": "show the mechanisms of a model or an adapter, or which attention can be replaced",
    "models": "print which families of timm train with sparse attention",
}


def build_overview() -> str:
    """Build the list of commands, with one line for each."""
    rows = SCRIPTS | {f"python -m thresher.{name}": said for name, said in MODULES.items()}
    width = max(map(len, rows)) + 2
    return "\n".join(
        [
            f"Thresher {__version__}: train transformers with sparse attention.",
            "",
            *(f"  {command:<{width}}{said}" for command, said in rows.items()),
            "",
            "Options are key=value. train.py, eval.py and the configs (conf/) lie in the folder of the project.",
            "train.py, eval.py, sweep, report, export, bench and doctor answer --help.",
            "Documentation: README.md and docs/ (start with docs/start.md); as a site: python -m zensical serve",
        ]
    )


def _print_overview() -> None:
    accept_any_text()
    print(build_overview())


if __name__ == "__main__":
    end_command(_print_overview)
