"""Build loggers that need a network: without one they log offline, and the log can be sent later."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_warn

from thresher.attention.options import check_choice
from thresher.signals import Interrupted

MODES = ("online", "offline", "disabled", "shared")


def build_logger(make: Callable[..., Any], wandb_id: str | None) -> Any:
    """Build a logger; if wandb cannot reach its server or has no key, it logs offline.

    Args:
        make: Builds the logger; arguments override those of the config.
        wandb_id: The run of wandb to continue, if the config names none.

    Raises:
        ValueError: wandb has no such mode.
    """
    logger = make()
    if not isinstance(logger, WandbLogger):
        return logger
    import wandb

    check_choice("logger.wandb.mode", logger._wandb_init.get("mode"), (*MODES, None))
    more: dict[str, Any] = {}
    if wandb_id is not None and logger._wandb_init.get("id") is None:
        more = {"id": wandb_id}
        logger = make(**more)
    try:
        _ = logger.experiment  # starts the run
    except wandb.errors.Error as error:
        wandb.teardown()
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        rank_zero_warn(
            f"wandb: {reason}. This run is logged offline, into {logger.save_dir}/wandb: where there is a network and "
            "a key (wandb login, or WANDB_API_KEY), `wandb sync` sends it. logger.wandb.mode=offline never "
            "contacts a server"
        )
        logger = make(mode="offline", **more)
    return logger


def list_logger_ids(loggers: Sequence[Logger]) -> dict[str, str]:
    """List the ids by which a later training continues the runs of its loggers."""
    return {"wandb": logger.experiment.id for logger in loggers if isinstance(logger, WandbLogger)}  # noqa: B035


@contextmanager
def close_loggers() -> Iterator[None]:
    """Close a wandb run with the exit code of the command."""
    code = 1
    try:
        yield
        code = 0
    except Interrupted as interruption:
        code = interruption.code
        raise
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=code)
