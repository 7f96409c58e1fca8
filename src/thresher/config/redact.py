"""Redact secrets, known by their names or by their form, from everything that is written down."""

import re
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(
    r"^token$|(^|[_-])(api[_-]?key|access[_-]key([_-]id)?|(private|ssh|signing|wandb)[_-]key|secrets?([_-]\w+)?"
    r"|passw(or)?d|passphrase|pwd|credentials?|(access|api|auth|bearer|github|hf|hub|refresh|session|wandb)[_-]token)$",
    re.IGNORECASE,
)
GONE = "(redacted)"
# Passwords in addresses, tokens in place of a user of a web address, secrets in queries, keys of well-known forms.
FORMS = (
    (re.compile(r"(?<=://)([^/\s:@]*):[^/\s]+(?=@)"), rf"\1:{GONE}"),
    (re.compile(r"(?<=http://)[^/\s:@]+(?=@)|(?<=https://)[^/\s:@]+(?=@)"), GONE),
    (re.compile(r"([?&][\w-]*(?:key|token|passw(?:or)?d|secret|signature)=)[^&\s]+", re.IGNORECASE), rf"\1{GONE}"),
    (re.compile(r"\b(?:hf_\w{20,}|gh[opsur]_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|xox[abpr]-[\w-]{10,})"), GONE),
)


def redact(node: Any) -> Any:
    """Copy nested plain values without secrets."""
    if isinstance(node, Mapping):
        return {k: GONE if SECRET.search(str(k)) and v else redact(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [redact(child) for child in node]
    return remove_secrets(node) if isinstance(node, str) else node


def remove_secrets(text: str) -> str:
    """Remove passwords and keys from a text."""
    for form, replacement in FORMS:
        text = form.sub(replacement, text)
    return text
