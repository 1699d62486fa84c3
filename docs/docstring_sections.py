"""Griffe extension for the API reference: docstring sections may follow each other without a blank line."""

import re
from typing import Any

import griffe


class DocstringSections(griffe.Extension):
    """Insert the blank line before a section that Griffe's Google-style parser needs."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            headings = r"(?<!\n)\n(Args|Attributes|Returns|Yields|Raises|Warns):\n"
            obj.docstring.value = re.sub(headings, r"\n\n\1:\n", obj.docstring.value)
