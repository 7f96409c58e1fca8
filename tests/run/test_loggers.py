"""wandb and TensorBoard: plain configs, pictures, and a run that is marked failed when training fails."""

import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from tests.run.test_tune import SHORT, stopping_at
from tests.running import tiny_config
from thresher.checkpoints.load import load_checkpoint
from thresher.run import train as training

QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "test=false")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def records(folder: Path, which: int = 0) -> Iterator[object]:
    """Yield the records of an offline run, as `wandb sync` would send them.

    The file is a log of LevelDB's form: 7 bytes of header, then blocks of 32 KiB with (crc, length, kind) before each
    fragment; kinds 1 and 4 end a record. What wandb's service is still writing is left out.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    path = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))[which]
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, payload = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(payload)
            yield record
            payload = b""


def exit_codes(folder: Path, which: int = 0) -> list[int]:
    """Return the exit codes that a run was closed with; wandb's service may write them after `finish` has returned."""
    deadline = time.monotonic() + 20
    while True:
        codes = [r.exit.exit_code for r in records(folder, which) if r.HasField("exit")]  # type: ignore[attr-defined]
        if codes or time.monotonic() > deadline:
            return codes
        time.sleep(0.1)


def test_wandb_offline_logs_a_plain_config_metrics_and_pictures_and_no_key(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training.train(tiny_config(folder, "logger=wandb", "logger.wandb.mode=offline", *QUICK))
    assert exit_codes(folder) == [0]
    pictures = {
        p.parent.name + "/" + p.name.split("_")[0] for p in folder.glob("wandb/offline-run-*/files/media/**/*.png")
    }
    assert pictures == {"heads/kept", "heads/threshold"}
    keys = {item.key for r in records(folder) if r.HasField("config") for item in r.config.update}  # type: ignore[attr-defined]
    assert {"attention", "compute", "seed"} <= keys
    history = {
        item.nested_key[0] if item.nested_key else item.key
        for r in records(folder)
        if r.HasField("history")  # type: ignore[attr-defined]
        for item in r.history.item  # type: ignore[attr-defined]
    }
    assert {"train/kept", "val/acc", "val/score"} <= history
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert b"0123456789abcdef0123456789abcdef01234567" not in written


def test_wandb_run_id_is_stored_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ("logger=wandb", "logger.wandb.mode=offline", "callbacks.watch.moved=0", *QUICK)
    training.train(tiny_config(folder, *overrides))
    ckpt = folder / "checkpoints" / "last.ckpt"
    first = load_checkpoint(ckpt)["thresher"]["loggers"]["wandb"]
    with pytest.warns(UserWarning, match="with other settings"):
        training.train(tiny_config(folder, *overrides, "trainer.max_epochs=2", f"resume='{ckpt}'"))
    assert load_checkpoint(ckpt)["thresher"]["loggers"]["wandb"] == first
    assert len(find_ids(folder)) == 1


def find_ids(folder: Path) -> set[str]:
    """Return the ids of the offline runs, whose folders are offline-run-TIME-ID, and -1 where two began in a second."""
    return {path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")}


def find_steps(folder: Path, which: int) -> list[int]:
    """Return the steps of a tuning that an offline run logged."""
    rows = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}  # type: ignore[attr-defined]
        for record in records(folder, which)
        if record.HasField("history")  # type: ignore[attr-defined]
    ]
    return [int(float(row["trainer/global_step"])) for row in rows if "train/error" in row]


def test_a_tuning_that_was_stopped_continues_its_wandb_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(folder, "logger=wandb", "logger.wandb.mode=offline", *SHORT, "test=false")
    with stopping_at(3), pytest.raises(KeyboardInterrupt):
        training.train(config)
    (first,) = find_ids(folder)
    assert find_steps(folder, 0) == [1, 2, 3]
    time.sleep(1.1)  # names of offline runs are sorted by the second
    training.train(config)
    assert find_ids(folder) == {first}
    assert exit_codes(folder, 1) == [0]
    assert find_steps(folder, 1) == [3, 4]
    assert load_checkpoint(folder / "checkpoints" / "best.ckpt")["thresher"]["loggers"]["wandb"] == first
    (folder / "tuning.json").write_text("{")
    with pytest.warns(UserWarning, match=r"tuning\.json is damaged .*: wandb begins another run"):
        training.train(config)
    assert len(find_ids(folder)) == 2


def test_wandb_run_is_marked_failed_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the training broke")

    monkeypatch.setattr("thresher.tasks.classification.Classification.training_step", fail)
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the training broke"):
        training.train(tiny_config(folder, "logger=wandb", "logger.wandb.mode=offline", *QUICK))
    assert exit_codes(folder) == [1]


def test_without_a_network_wandb_logs_offline_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    folder = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"This run is logged offline, into .*/run/wandb: .*`wandb sync` sends it"):
        metrics = training.train(tiny_config(folder, "logger=wandb", "logger.wandb.settings.init_timeout=5", *QUICK))
    assert "train/loss" in metrics
    assert exit_codes(folder) == [0]


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers everything with one status."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(request.param)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    import wandb

    wandb.teardown()  # its service knows the servers of earlier tests
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    assert asked


@pytest.mark.parametrize("server", [401, 403, 500], indirect=True)
def test_a_server_that_answers_with_an_error_or_refuses_the_key_stops_no_training(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server)
    folder = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"This run is logged offline, into .*/run/wandb"):
        metrics = training.train(tiny_config(folder, "logger=wandb", "logger.wandb.settings.init_timeout=5", *QUICK))
    assert "train/loss" in metrics
    assert exit_codes(folder) == [0]


def test_a_mode_that_wandb_does_not_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode must be one of online, offline, .*; got 'onlin'"):
        training.train(tiny_config(tmp_path / "run", "logger=wandb", "logger.wandb.mode=onlin", *QUICK))


def test_wandb_disabled_trains(tmp_path: Path) -> None:
    metrics = training.train(tiny_config(tmp_path / "run", "logger=wandb", "logger.wandb.mode=disabled", *QUICK))
    assert "train/loss" in metrics


def test_tensorboard_receives_scalars_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    training.train(tiny_config(folder, "logger=tensorboard", *QUICK))
    (events,) = (folder / "tensorboard").glob("*/events*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert {"heads/kept", "heads/threshold"} <= set(log.Tags()["images"])
    assert "train/kept" in log.Tags()["scalars"]


def test_no_logger_and_no_callbacks_train(tmp_path: Path) -> None:
    metrics = training.train(tiny_config(tmp_path / "run", "logger=none", "callbacks=none", *QUICK))
    assert "train/loss" in metrics
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_head_without_threshold_has_no_threshold_picture(tmp_path: Path) -> None:
    from thresher.callbacks.heads import log_heat_maps

    class Recorder(pl.loggers.TensorBoardLogger):
        shown: list[str]

        @property
        def experiment(self) -> "Recorder":  # type: ignore[override]
            return self

        def add_figure(self, name: str, figure: object, step: int) -> None:
            self.shown.append(name)

    recorder = Recorder(str(tmp_path))
    recorder.shown = []
    log_heat_maps(recorder, {"layer": [{"kept": 0.5, "threshold": None, "compute": 1.0}]}, step=1)
    assert recorder.shown == ["heads/kept"]
    assert torch.is_grad_enabled()
