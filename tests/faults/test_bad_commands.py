"""Commands that cannot be obeyed, and places that cannot be written to: one message, at once, and a non-zero exit.

Each trial runs train.py or eval.py as a user does.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm
from tests.faults.processes import ENVIRONMENT, ROOT
from tests.faults.test_bad_input import LISTOPS
from tests.running import TINY
from thresher.checkpoints import files
from thresher.config import overrides
from thresher.kernels.build import find_cache_folder


def call(
    script: str, *arguments: str, cwd: Path, home: str | None = None, imports: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does; HOME is missing, or what is given. With `imports` a new interpreter runs it."""
    inherited = {k: v for k, v in ENVIRONMENT.items() if k not in ("HOME", "WANDB_API_KEY")}
    env = inherited | ({} if home is None else {"HOME": home}) | environment
    command = [str(ROOT / script), *arguments]
    if not imports:
        return warm.run(command, cwd, env)
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def message(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one message of a command that failed."""
    lines = result.stderr.splitlines()
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    assert len([line for line in lines if line.startswith("error: ")]) == 1, result.stderr
    return next(line for line in lines if line.startswith("error: "))


# Places


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MiB."""
    yield from mounted(tmp_path / "small", "size=2m")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that nothing can be written to."""
    yield from mounted(tmp_path / "sealed", "ro")


def mounted(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system of its own must be mounted, which is not permitted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_read_only_folder_is_told_before_anything_begins(read_only: Path, tmp_path: Path) -> None:
    said = message_before_torch("train.py", f"run.dir='{read_only}/run'", cwd=tmp_path)
    assert "Read-only file system" in said
    assert str(read_only) in said


def test_a_full_disk_ends_the_training_with_a_message_and_leaves_the_old_checkpoint(
    small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    asked = (*TINY, f"run.dir='{run}'", "callbacks.watch.moved=0", "trainer.max_epochs=1")
    first = call("train.py", *asked, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(bytes(max(free - 8192, 0)))
    said = message(
        call("train.py", *asked, "trainer.max_epochs=3", f"resume='{run}/checkpoints/last.ckpt'", cwd=tmp_path)
    )
    assert "No space left on device" in said
    assert str(run) in said
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before


def test_a_write_that_finds_the_disk_full_keeps_what_was_there(tmp_path: Path) -> None:
    """The device of Linux that is always full, where no file system can be mounted."""
    path = tmp_path / "metrics.json"
    files.write_text(path, "old")
    (tmp_path / "metrics.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*metrics\.json \(No space left on device\)") as caught:
        files.write_text(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_missing_home_is_no_obstacle(home: str | None, tmp_path: Path) -> None:
    result = call("train.py", *TINY, f"run.dir='{tmp_path}/run'", "debug=fdr", cwd=tmp_path, home=home, imports=True)
    assert result.returncode == 0, result.stderr


def test_a_cache_in_a_home_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    said = message(
        call("train.py", *LISTOPS, f"run.dir='{tmp_path}/run'", cwd=tmp_path, home="/proc/none", imports=True)
    )
    assert "/proc/none" in said


def test_any_name_works_or_is_told(tmp_path: Path) -> None:
    """Unicode, blanks and what Hydra's grammar knows, in the name of a run and of its folder."""
    name = "größe = 1, naïve {β} $x №"
    folder = tmp_path / name
    asked = (*TINY, f"run.name={overrides.quote(name.replace('$', ''))}", "test=false", "trainer.max_epochs=1")
    result = call(
        "train.py", *asked, f"run.dir={overrides.quote(str(folder))}", "callbacks.watch.moved=0", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (folder / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("x" * 300, "File name too long"),
        ("/".join(["y" * 200] * 25), "File name too long"),
        ("file/run", "Not a directory"),
    ],
    ids=["long name", "long path", "below a file"],
)
def test_a_folder_that_cannot_be_made_is_told_at_once(place: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert said in message_before_torch("train.py", f"run.dir='{tmp_path}/{place}'", cwd=tmp_path)


# Commands


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("train.py", ["attention.topkk=3"], "attention has no key 'topkk'"),
        ("train.py", ["attention=latt"], "there is no attention=latt; did you mean latte?"),
        ("train.py", ["trainer.max_epochs=abc"], "trainer.max_epochs must be a whole number, like 8, not 'abc'"),
        ("train.py", ["seed=0,1"], "python train.py -m seed=0,1 trains with each. A list is 'seed=[0,1]'"),
        ("train.py", ["seed=null"], "seed must be a whole number, 0 .. 4294967295; got None"),
        ("train.py", ["data=image_folder"], "data.root has no value of its own: give one by data.root=..."),
        ("train.py", ["init_from=nowhere.ckpt"], "init_from=nowhere.ckpt: there is no checkpoint nowhere.ckpt"),
        ("train.py", ["init_from="], "init_from is empty: name a checkpoint"),
        ("train.py", ["resume=sometimes"], "resume=sometimes is neither auto nor never, and there is no checkpoint"),
        ("train.py", ["run.dir="], "run.dir is empty"),
        ("train.py", ["run.dir=null"], "run.dir"),
        ("train.py", ["seed=${nothing}"], "seed: Interpolation key 'nothing' not found"),
        ("eval.py", ["ckpt="], "which checkpoint?"),
        ("eval.py", ["ckpt=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        ("eval.py", ["ckpt=nowhere.ckpt", "attention=latt"], "there is no attention=latt; did you mean latte?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_known_before_the_imports_is_told_at_once(
    script: str, arguments: list[str], said: str, tmp_path: Path
) -> None:
    assert said in message_before_torch(script, *arguments, cwd=tmp_path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("attention.gate.mode=banana", "gate.mode must be one of ste, soft, hard; got 'banana'"),
        ("compute.target=2", "compute.target is a share of dense kept in (0, 1], got 2"),
        ("optimizer.lr=-1", "optimizer.lr must be a finite number, at least 0; got -1"),
    ],
)
def test_a_wrong_value_is_told_before_data_are_read_and_lightning_is_imported(
    override: str, said: str, tmp_path: Path
) -> None:
    assert said in message_before("pytorch_lightning", "train.py", override, f"run.dir='{tmp_path}/run'", cwd=tmp_path)
    assert not (tmp_path / "run" / "config.yaml").exists()


def message_before_torch(script: str, *arguments: str, cwd: Path) -> str:
    """Return the message of a command that failed before it imported torch."""
    return message_before("torch", script, *arguments, cwd=cwd)


def message_before(heavy: str, script: str, *arguments: str, cwd: Path) -> str:
    """Return the message of a command that failed before it imported a library."""
    result = call(script, *arguments, cwd=cwd, imports=True, PYTHONPROFILEIMPORTTIME="1")
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")
    }
    assert "thresher" in imported
    assert heavy not in imported
    return message(result)


def test_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    result = call("train.py", "seed=null", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_without_a_key_wandb_logs_offline_and_says_how_to_give_one(tmp_path: Path) -> None:
    asked = (*TINY, "logger=wandb", "trainer.max_epochs=1", "test=false", f"run.dir='{tmp_path}/run'")
    kernels = str(find_cache_folder().parents[1])  # built ones: that home has none
    home = {"home": str(tmp_path), "XDG_CACHE_HOME": kernels}
    result = call("train.py", *asked, "callbacks.watch.moved=0", cwd=tmp_path, imports=True, **home)
    assert result.returncode == 0, result.stderr
    assert "wandb: No API key configured" in result.stderr
    assert "This run is logged offline" in result.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
