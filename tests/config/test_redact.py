"""Secrets by name and by form; and what only sounds like one."""

from pathlib import Path

import pytest

from tests.running import CONF
from thresher.cli.main import check_secrets
from thresher.config.overrides import compose_config, parse
from thresher.config.redact import GONE, redact
from thresher.run.run import resolve_config

NAMES = [
    *("api_key", "apikey", "wandb_api_key", "WANDB_API_KEY", "token", "hf_token"),
    *("access_token", "auth_token", "secret", "client_secret", "secret_key", "aws_secret_access_key"),
    *("aws_access_key_id", "password", "db_password", "passwd", "passphrase", "pwd"),
    *("credentials", "private_key", "bearer_token", "github_token", "api-key", "secret_token"),
]
FORMS = {
    "postgresql://user:p%40ss@host/db": f"postgresql://user:{GONE}@host/db",
    "postgresql+psycopg://user:p@ss:w@host:5432/db?x=1": f"postgresql+psycopg://user:{GONE}@host:5432/db?x=1",
    "redis://:pw@host": f"redis://:{GONE}@host",
    "see https://ghp_abc@github.com/x and http://u:p@h/": f"see https://{GONE}@github.com/x and http://u:{GONE}@h/",
    "https://host/file?token=abc&x=1&X-Signature=y": f"https://host/file?token={GONE}&x=1&X-Signature={GONE}",
    "hf_" + "a1" * 17: GONE,
    "AKIAIOSFODNN7EXAMPLE": GONE,
}
HARMLESS = {
    "class_token": True,
    "token_dropout": 0.1,
    "max_tokens": 5,
    "tokenizer": "bytes",
    "keys": 0.15,
    "always_keep": 1,
    "api_key": None,
    "password": "",
    "storage": "postgresql://user@host/db",
    "root": "C:/a@b:c",
    "url": "https://host:80/x@y",
    "file": "sqlite:////tmp/x.db",
    "text": "key: value, a@b.c",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_named_like_a_secret_is_left_out(name: str) -> None:
    assert redact({"a": [{name: "x"}, ({name: 7},)]}) == {"a": [{name: GONE}, [{name: GONE}]]}


@pytest.mark.parametrize("text", FORMS)
def test_what_looks_like_a_secret_is_left_out(text: str) -> None:
    assert redact({"a": [text]}) == {"a": [FORMS[text]]}


def test_nothing_else_is(tmp_path: Path) -> None:
    assert redact(HARMLESS) == HARMLESS


def test_the_config_that_is_logged_stored_and_sent_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    asked = ["run.name=x", "run.dir=y", "+data.api_key='${oc.env:A_SECRET}'", "tags=['http://u:hunter2@h/']"]
    assert "hunter2" not in str(resolve_config(compose_config(CONF, "train", asked)))


@pytest.mark.parametrize(
    "override", ["+logger.wandb.api_key=abc", "+hf_token=abc", "data.root='https://u:p@host/x'", "+a=ghp_" + "a" * 36]
)
def test_a_secret_on_the_command_line_is_refused(override: str) -> None:
    with pytest.raises(ValueError, match="in the environment"):
        check_secrets(parse([override]))


def test_a_reference_to_the_environment_is_not() -> None:
    check_secrets(
        parse(["+logger.wandb.api_key='${oc.env:KEY}'", "model.class_token=true", "attention=latte", "~logger"])
    )
