"""Train in processes that the command spawns or forks and waits for, as in `trainer=ddp_sim`.

Lightning returns the weights, the metrics and the path of the best checkpoint to the waiting process. The launcher here
also returns the progress of the loops, the state of callbacks and budget, and the length of the logs. An error or a
signal that ends a process ends the command as with one process.
"""

import io
import multiprocessing
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from thresher.callbacks.csv_log import CsvLog
from thresher.callbacks.snapshots import Snapshots
from thresher.signals import Interrupted, Signals, announce_stop

HANDED_OVER = "thresher"  # key among the results that Lightning hands over
ERROR = re.compile(r"^(?:([\w.]+)\.)?(\w+): ", re.MULTILINE)  # in a traceback: module and class of an error


def use_launcher(trainer: pl.Trainer) -> None:
    """Replace Lightning's launcher of a trainer by `Launcher` if it spawns or forks processes.

    Lightning builds the launcher of a strategy itself, and takes no other one.
    """
    strategy: Any = trainer.strategy
    if type(strategy.launcher) is _MultiProcessingLauncher:
        strategy._launcher = Launcher(strategy, strategy.launcher._start_method)


class Launcher(_MultiProcessingLauncher):
    """Starts the processes of a training or a test, and returns the state of the first."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run a function in all processes; return the result of the first.

        Raises:
            Interrupted: This or another process received a signal, and all have stopped.
            ValueError: A process raised it; OSError likewise.
        """
        signum = multiprocessing.get_context(self._start_method).Value("i", 0)
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        signals: list[Signals] = [callback.signals for callback in _list_snapshots(trainer)] if fitting else []
        try:
            with ExitStack() as stack:
                for each in signals:
                    stack.enter_context(each.share(signum))
                try:
                    return super().launch(function, *args, trainer=trainer, **kwargs)
                except Interrupted as interruption:
                    signum.value = interruption.signum
                    if signals:
                        announce_stop(interruption.signum)
                        for process in multiprocessing.active_children():
                            process.join()
                    raise
        except ProcessExitedException as error:
            if error.exit_code > 128:
                raise Interrupted(error.exit_code - 128) from error
            raise
        except ProcessRaisedException as error:
            raise find_error(error) from error
        finally:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()

    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._wrapping_function(*args, **kwargs)
        except Interrupted as interruption:
            sys.exit(interruption.code)

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Collect the state of the first process at the end."""
        extra = super().get_extra_results(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return extra
        known: dict[str, Any] = {
            "loop": trainer.fit_loop.state_dict(),
            "callbacks": [callback.state_dict() for callback in _list_callbacks(trainer)],
            "metrics": [callback.metrics for callback in _list_snapshots(trainer)],
            "rows": [logger.count_rows() for logger in trainer.loggers if isinstance(logger, CsvLog)],
        }
        trainer.lightning_module.on_save_checkpoint(known)
        buffer = io.BytesIO()
        torch.save(known, buffer)  # as bytes: shared memory would go with the process
        return extra | {HANDED_OVER: buffer.getvalue()}

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        """Restore the state of the first process in the waiting one."""
        super().update_main_process_results(trainer, extra)
        if HANDED_OVER not in extra:
            return
        known = torch.load(io.BytesIO(extra[HANDED_OVER]), map_location="cpu", weights_only=True)
        trainer.fit_loop.load_state_dict(known["loop"])
        trainer.lightning_module.on_load_checkpoint(known)
        for callback, state in zip(_list_callbacks(trainer), known["callbacks"], strict=True):
            if state:
                callback.load_state_dict(state)
        for snapshots, metrics in zip(_list_snapshots(trainer), known["metrics"], strict=True):
            snapshots.restore_metrics(metrics)
        tables = [logger for logger in trainer.loggers if isinstance(logger, CsvLog)]
        for table, rows in zip(tables, known["rows"], strict=True):
            table.continue_from(rows)


def find_error(error: ProcessRaisedException) -> Exception:
    """Find the error for a user in the traceback that a process left; the error itself without one."""
    for match in reversed(list(ERROR.finditer(error.msg))):
        kind = getattr(sys.modules.get(match[1] or "builtins"), match[2], None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            text = error.msg[match.end() :].strip()
            if issubclass(kind, (ValueError, MisconfigurationException)):
                return ValueError(text)
            return OSError(text) if issubclass(kind, OSError) else error
    return error


def _list_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _list_snapshots(trainer: pl.Trainer | None) -> list[Snapshots]:
    return [] if trainer is None else [each for each in _list_callbacks(trainer) if isinstance(each, Snapshots)]
