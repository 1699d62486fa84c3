"""Redact credentials in text that is printed or saved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

REDACTED = "[redacted]"
_SECRET_WORD = (
    r"(?:secret|password|passwd|passphrase|credential|signature|api[_-]?key|access[_-]?key|account[_-]?key|"
    r"private[_-]?key|(?:access|api|auth|bearer|bot|hf|hub|id|refresh|secret|security|session|private)[_-]?token)"
)
_SIGNED_QUERY = re.compile(
    r"(?:^|[&;])(?:x-amz-|x-goog-|awsaccesskeyid|googleaccessid|key-pair-id|policy=|sig=|se=|key=|apikey=|token=|"
    rf"[\w-]*{_SECRET_WORD})",
    re.IGNORECASE,
)
# Every pattern takes time linear in the text: a match starts at a bounded number of places for each character, and what
# precedes a secret is not part of the match. The tests count the steps.
_SCHEME = r"\b[a-z][a-z0-9+.-]{0,31}://"
_URL = re.compile(rf"({_SCHEME}[^\s?\"'<>`]+)(?:\?([^\s\"'<>`)]+))?", re.IGNORECASE)
_USER_IN_URL = re.compile(rf"({_SCHEME})[^/\s@\"'<>`]+@", re.IGNORECASE)

# name = value, name: value, "name": "value"; null, none, true and false stay.
_NAMED = re.compile(
    rf"({_SECRET_WORD}(?:(?!{_SECRET_WORD})\w)*[\"']?\s*[=:]\s*)(?!(?:null|none|true|false)\b)"
    r"(\"[^\"\n]+\"?|'[^'\n]+'?|[^\s\"',;}&]+)",
    re.IGNORECASE,
)
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\b(?:hf|gh[pousr]|npm|glpat|r8)[_-][A-Za-z0-9_-]{16,}"
    r"|\bgithub_pat_\w{20,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bAIza[0-9A-Za-z_-]{35}"
    r"|\bya29\.[0-9A-Za-z_-]{20,}"
    r"|\bdapi[0-9a-f]{32}\b"
    r"|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|(?<=[Bb]earer )[\w.~+/=-]{12,}"
    # The shape of a secret access key: 40 characters with a digit and both cases.
    r"|(?<![\w/+=.-])(?=[A-Za-z/+]*\d)(?=[a-z\d/+]*[A-Z])(?=[A-Z\d/+]*[a-z])[A-Za-z0-9/+]{40}(?![\w/+=-]|\.\w)",
    re.DOTALL,
)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Redact what looks like a credential.

    That is: known formats of keys and tokens, values after names such as `password` or `hf_token`, users in URLs,
    signed query strings, and values of environment variables with such names.

    Args:
        environment: variables whose values are redacted; None = those of this process.
    """
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= 16 and re.search(rf"{_SECRET_WORD}|token$", name, re.IGNORECASE):
            text = text.replace(value, REDACTED)
    text = _SHAPES.sub(REDACTED, text)
    text = _USER_IN_URL.sub(rf"\g<1>{REDACTED}@", text)
    text = _URL.sub(lambda url: f"{url[1]}?{REDACTED}" if _SIGNED_QUERY.search(url[2] or "") else url[0], text)
    return _NAMED.sub(lambda pair: pair[0] if REDACTED in pair[2] else f"{pair[1]}{REDACTED}", text)
