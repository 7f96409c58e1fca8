"""Log metrics as CSV: a resumed training continues the file, and a kill never leaves it half written."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from thresher.checkpoints import files


class CsvLog(CSVLogger):
    """Log to `save_dir/name/version_N/metrics.csv`: a row for each call, a column for each metric.

    Args:
        save_dir: The folder of the run.
        name: A folder in it.
        version: N.
        flush_logs_every_n_steps: Rows are written when the step is a multiple of this, and with every snapshot.
    """

    def __init__(self, save_dir: str, name: str = "csv", version: int = 0, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, name, version, flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._rows = _Rows(self.log_dir)

    @property
    def experiment(self) -> Any:
        return self._rows

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        self._rows.log_metrics(dict(metrics), step)
        if (step or 0) % self._flush_logs_every_n_steps == 0:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the pending rows."""
        self._rows.save()

    def count_rows(self) -> int:
        """Write all rows and count them."""
        self.save()
        return self._rows.count

    @rank_zero_only
    def continue_from(self, rows: int) -> None:
        """Keep the first rows of the existing file, and continue it."""
        self._rows.keep(rows)


class _Rows(ExperimentWriter):
    """The rows of a file, written and pending.

    Args:
        log_dir: The folder.
    """

    def __init__(self, log_dir: str) -> None:
        self.metrics: list[dict[str, float]] = []
        self.metrics_keys: list[str] = []
        self.hparams: dict[str, Any] = {}
        self.log_dir = log_dir
        self.count = 0
        self._file = Path(log_dir) / self.NAME_METRICS_FILE
        self._exists = False

    def keep(self, rows: int) -> None:
        """Start with the first rows of the file."""
        kept: list[dict[str, Any]] = []
        if rows:
            with self._file.open(newline="") as file:
                kept = [row for row, _ in zip(csv.DictReader(file), range(rows), strict=False)]
        if len(kept) < rows:
            raise ValueError(f"{self._file} has {len(kept)} rows, but the snapshot was taken after {rows}")
        self.metrics_keys = sorted(set().union(*kept)) if kept else []
        self._replace(kept)
        self.count, self._exists = rows, True

    def save(self) -> None:
        """Append the pending rows; rewrite the file if a column is new."""
        if not self.metrics:
            return
        waiting, self.metrics = self.metrics, []
        columns = sorted(set(self.metrics_keys).union(*waiting))
        if self._exists and columns == self.metrics_keys:
            with self._file.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerows(waiting)
        else:
            written: list[dict[str, Any]] = []
            if self._exists:
                with self._file.open(newline="") as file:
                    written = list(csv.DictReader(file))
            self.metrics_keys = columns
            self._replace([*written, *waiting])
            self._exists = True
        self.count += len(waiting)

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self._file, text.getvalue())
