"""Write a trained network as files: `python -m thresher.export ckpt=RUN [key=value ...]`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from thresher.config.commands import asks_for_help, compose_options, find_conf, read_help
from thresher.console import accept_any_text, end_command

FORMATS = ("safetensors", "torch", "onnx")


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    accept_any_text()
    try:
        if not arguments or asks_for_help(arguments):
            print(read_help("export"))
            return 0
        cfg = read_options(arguments)
        from thresher.tools.export.run import export

        folder = export(Path(cfg.ckpt), cfg.run.dir, cfg.format, cfg.adapter)
    except BrokenPipeError:
        raise
    except ImportError as error:
        print(f"error: format=onnx needs {error.name}: pip install 'thresher[onnx]'", file=sys.stderr)
        return 1
    except (ValueError, OSError, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        print(f"error: {error}\n(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def read_options(arguments: Sequence[str]) -> DictConfig:
    """Check the arguments and compose the config.

    Raises:
        ValueError: There is no such option or format, or no run is named.
    """
    cfg = compose_options(find_conf("export"), "export", arguments, input_key="ckpt")
    if OmegaConf.is_missing(cfg, "ckpt"):
        raise ValueError("which run? python -m thresher.export ckpt=RUN [adapter=FOLDER] [run.dir=DIR] [format=onnx]")
    if cfg.format not in FORMATS:
        raise ValueError(f"there is no format={cfg.format}. Available: {', '.join(FORMATS)}")
    return cfg


if __name__ == "__main__":
    end_command(lambda: main(sys.argv[1:]))
