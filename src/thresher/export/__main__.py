"""The command: `python -m thresher.export RUN [out=DIR] [format=safetensors|torch|onnx]`."""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """Write a trained network as files for use elsewhere.

  python -m thresher.export RUN                  weights (safetensors), config.json and a model card, into RUN/export
  python -m thresher.export RUN out=DIR          into another folder
  python -m thresher.export RUN format=torch     and the program of torch.export, model.pt2
  python -m thresher.export RUN format=onnx      and the network as ONNX, model.onnx

RUN is the folder of a run, whose best checkpoint is taken, or a checkpoint. thresher.load_model(DIR) loads the result,
python eval.py ckpt=DIR tests it. Programs are written for attention whose sparsity is fixed: latte, topk, dense.
"""
FORMATS = ("safetensors", "torch", "onnx")
OPTIONS = ("out", "format")


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what the arguments name; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or {"-h", "--help"} & set(given):
        print(HELP, end="")
        return 0
    try:
        run, options = parsed(given)
        from thresher.export.run import export

        folder = export(run, options.get("out"), options.get("format", FORMATS[0]))
    except ImportError as error:
        print(f"error: format=onnx needs {error.name}: pip install 'thresher[onnx]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"error: {error}\n(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def parsed(arguments: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Return the run and the options of a command line.

    Raises:
        ValueError: An option is none of ours, or there is not one run.
    """
    options: dict[str, str] = {}
    runs = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or os.path.exists(argument):  # a folder may have such a name
            runs.append(argument)
        elif name in OPTIONS:
            options[name] = value
        else:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"thresher.export has no option {name!r}{hint} It has: {', '.join(OPTIONS)}")
    if len(runs) != 1:
        raise ValueError(f"one run at a time: python -m thresher.export RUN [out=DIR]; got {', '.join(runs) or 'none'}")
    if options.get("format", FORMATS[0]) not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {options['format']!r}")
    return Path(runs[0]), options


if __name__ == "__main__":
    sys.exit(main())
