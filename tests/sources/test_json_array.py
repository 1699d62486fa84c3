"""A JSON array decoded element by element equals the array decoded at once, in little memory, with readable errors."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankllm_composer.errors import SourceError
from rankllm_composer.sources import json_array
from rankllm_composer.sources.json_array import iterate_array

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_elements_equal_those_of_the_array_decoded_at_once(chunk, values, indent, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK_CHARS", chunk)
        assert [value for value, _ in iterate_array(io.StringIO(text))] == values


def test_elements_come_with_their_length_in_characters():
    assert list(iterate_array(io.StringIO('[ {"a": 1} ,"bc"]'))) == [({"a": 1}, 8), ("bc", 4)]


@pytest.mark.parametrize(
    ("text", "index", "reason"),
    [
        ("", None, "the start is empty"),
        ('{"id": 1}', None, "the start is '{'"),
        ('{"id": 1}\n{"id": 2}', None, ".jsonl"),
        ("[", 0, "the file ends before the array does"),
        ("[1, 2", 1, "followed by the end of the file"),
        ("[1, ", 1, "the file ends before the array does"),
        ("[1 2]", 0, "followed by '2'; expected ',' or ']'"),
        ('[{"a": 1}, {"a": }]', 1, "invalid JSON: Expecting value"),
        ('[{"a": "never ends}]', 0, "Unterminated string"),
        ("[1] 2", None, "the array is followed by '2'"),
        ("[1,]", 1, "invalid JSON"),
        ("[" * 100_000, 0, "cannot be decoded"),
        ("[" + "9" * 5000 + "]", 0, "cannot be decoded"),
    ],
)
def test_text_that_is_not_an_array_is_an_error(text, index, reason):
    with pytest.raises(SourceError) as caught:
        list(iterate_array(io.StringIO(text)))
    assert caught.value.index == index
    assert reason in str(caught.value)


def test_a_missing_quote_does_not_read_the_rest_of_the_file(monkeypatch):
    monkeypatch.setattr(json_array, "MAX_ELEMENT_CHARS", 1 << 21)
    file = Endless('[{"a": "', "x" * 1000)
    with pytest.raises(SourceError, match="longer than 2 Mi characters"):
        next(iterate_array(file))
    assert file.num_read < 1 << 23


def test_memory_does_not_grow_with_the_array():
    file = Endless("[1", ',{"id": "' + "x" * 10_000 + '"}')
    elements = iterate_array(file)
    next(elements)
    tracemalloc.start()
    for _ in range(3000):  # 30 MB
        next(elements)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.num_read > 30_000_000
    assert peak < 6_000_000


class Endless:
    """A text file with a beginning and an endlessly repeated piece."""

    def __init__(self, head: str, piece: str) -> None:
        self.pending, self.piece, self.num_read = head, piece, 0

    def read(self, num_chars: int) -> str:
        self.pending += self.piece * (num_chars // len(self.piece) + 1)
        text, self.pending = self.pending[:num_chars], self.pending[num_chars:]
        self.num_read += len(text)
        return text
