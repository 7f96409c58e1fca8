"""Loggers that need a network: without one a training goes on all the same, and its log can be sent later."""

from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_warn

from thresher.attention.options import check_choice

MODES = ("online", "offline", "disabled", "shared")


def connected(make: Callable[..., Any]) -> Any:
    """Build a logger; one of wandb that cannot reach its server, or has no key for it, logs offline instead.

    Args:
        make: Builds the logger, with other arguments than the config's where they are given.

    Raises:
        ValueError: wandb has no such mode.
    """
    logger = make()
    if not isinstance(logger, WandbLogger):
        return logger
    import wandb

    check_choice("logger.wandb.mode", logger._wandb_init.get("mode"), (*MODES, None))
    try:
        _ = logger.experiment
    except wandb.errors.Error as error:
        wandb.teardown()
        rank_zero_warn(
            f"wandb: {_first_line(error)}. This run is logged offline, into {logger.save_dir}/wandb: where there is a "
            "network and a key (wandb login, or WANDB_API_KEY), `wandb sync` sends it. logger.wandb.mode=offline asks "
            "for no server from the beginning"
        )
        logger = make(mode="offline")
    return logger


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
