"""Folders of strangers: whatever a run's files contain, `report` and `--card` write a page or end in one line."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support.contracts import new_contract

from rankllm_composer.cli import main
from rankllm_composer.errors import RankLLMComposerError
from rankllm_composer.escaping import for_screen
from rankllm_composer.export.model_card import CardFacts, add_figures, render_card
from rankllm_composer.ranking.comparison import read_rerank_result
from rankllm_composer.report.page import write_report
from rankllm_composer.report.run_record import read_run

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=12),
    st.sampled_from(["$\\frac{", "<script>", "a|b", "_x", "\x1b[2J", "a\nb", "`", "](x)", "\\|", "&lt;", "\ud800"]),
)
NUMBER = st.one_of(st.floats(), st.integers(-5, 40), st.sampled_from([10**400, 1e308, -1e308, 1 << 70, True]))
JSON = st.recursive(
    st.one_of(st.none(), NUMBER, TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)
NAMES = ["event", "batch", "epoch", "samples", "tokens", "lr", "tokens_per_second", "not_finite", "loss/train/total"]
NAMES += ["loss/train/$x_{", "eval/first_token/ndcg@10", "eval/oracle/ndcg@10", "data/lists_trained", "loss/train/"]
LINES = st.dictionaries(st.sampled_from(NAMES), st.one_of(NUMBER, JSON)).flatmap(
    lambda line: st.sampled_from([line, {"event": "batch", "batch": 3, "epoch": 0, **line}, {**line, "event": "batch"}])
)
FIGURES = st.dictionaries(st.sampled_from(["presented", "first_token", "generation"]), st.one_of(NUMBER, JSON))
DETAILS = st.fixed_dictionaries(
    {"batch": st.one_of(st.integers(0, 3), JSON)},
    optional={
        "ndcg@10": st.one_of(JSON, st.dictionaries(TEXT, st.one_of(FIGURES, JSON), max_size=3)),
        "positions": st.one_of(
            JSON,
            st.dictionaries(
                st.sampled_from(["first_token", "generation", "x"]),
                st.sampled_from(
                    [[], [[]], [[1, 2], [3, 4]], [[1], [2, 3]], [[None]], [[-1]], [[1 << 70]], 3, [["a"]], [[0]]]
                ),
            ),
        ),
    },
)


def write_lines(path: Path, values: list[object], tail: bytes = b"") -> None:
    path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in values) + tail)


@settings(max_examples=25)
@given(
    st.lists(st.one_of(LINES, JSON), max_size=4),
    st.lists(st.one_of(DETAILS, JSON), max_size=3),
    st.one_of(st.binary(max_size=30), TEXT.map(lambda text: f"run: {{name: {text}}}".encode("utf-8", "replace"))),
    st.binary(max_size=10),
)
def test_any_files_of_a_run_become_a_page(tmp_path_factory, lines, details, recipe, tail):
    folder = tmp_path_factory.mktemp("run") / "$\\frac{_x<b>"
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", lines, tail)
    write_lines(folder / "evaluations.jsonl", details, tail)
    (folder / "recipe.yaml").write_bytes(recipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        write_report([read_run(folder), read_run(folder)], folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "<b>" not in text and for_screen(text) == text
    shutil.rmtree(folder)


def test_what_is_left_out_is_counted(tmp_path, capsys):
    folder = tmp_path / "\x1b[31m_$x$"
    folder.mkdir()
    whole = {"event": "batch", "batch": 1, "epoch": 0, "tokens": 5, "lr": 0.1, "loss/train/total": 2.0, "other": "x"}
    write_lines(
        folder / "metrics.jsonl",
        [whole, {**whole, "batch": 2, "tokens": None, "lr": "fast"}, [1], whole | {"event": 3}],
    )
    write_lines(
        folder / "evaluations.jsonl", [{"batch": 1, "ndcg@10": {"a": {"presented": [1]}, "b": 2}, "positions": {}}]
    )
    assert read_run(folder).num_damaged == 2 + 1 + 1 + 2
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder)])
    out, err = capsys.readouterr()
    assert not ended.value.code
    assert "\x1b" not in out + err and "6 damaged lines and values are left out" in err
    page = (folder / "report.html").read_text()
    assert "\x1b" not in page and "\\x1b[31m_$x$" in page and "Damaged lines and values, left out</td><td>6" in page


MEASURE = st.fixed_dictionaries({"first_stage": JSON, "reranked": st.dictionaries(TEXT, NUMBER)})
MEASURES = st.dictionaries(TEXT, st.one_of(JSON, MEASURE), max_size=2)
RESULT = st.fixed_dictionaries({"name": TEXT, "model": TEXT, "decoding": TEXT, "measures": MEASURES})


@given(st.one_of(JSON, RESULT))
def test_any_result_of_a_reranking_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "x.figures.json"
    path.write_text(json.dumps(content))
    try:
        result = read_rerank_result(path)
    except RankLLMComposerError as error:
        assert "Rerank again." in str(error)
    else:
        assert result.comparisons and isinstance(result.name, str)


MEASURED = st.dictionaries(TEXT, st.floats(-1, 1), max_size=3)


@settings(max_examples=60)
@given(MEASURED, MEASURED, TEXT, TEXT, TEXT)
def test_a_card_of_any_names_has_no_markup_and_is_stable(tmp_path_factory, figures, published, name, base, license):
    facts = CardFacts(
        name=name,
        base_model=base,
        base_license=license,
        contract=new_contract("combined"),
        data=(name, base),
        hyperparameters={name: base},
        progress=license,
        figures=figures,
        published=published,
    )
    card = tmp_path_factory.getbasetemp() / "README.md"
    card.write_text(render_card(facts), encoding="utf-8")
    page = MarkdownIt("commonmark").enable("table")
    tokens = page.parse(card.read_text(encoding="utf-8").split("---\n", 2)[2])
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    kinds = {token.type for token in tokens} | {child.type for child in inline}
    assert kinds.isdisjoint({"html_block", "html_inline", "link_open", "image", "em_open", "strong_open"})
    assert {token.tag for token in tokens if token.type == "heading_open"} == {"h1", "h2"}
    assert sum(token.type == "table_open" for token in tokens) == (2 if figures or published else 1)
    add_figures(card, figures)
    once = card.read_bytes()
    for _ in range(2):
        add_figures(card, figures)
        assert card.read_bytes() == once


def test_a_name_is_escaped_once_however_often_figures_are_added(tmp_path):
    card, name = tmp_path / "README.md", "dl20|`x` <b>*bm25*</b> \\ _y_ $z$\n[link](http://x)/nDCG@10"
    card.write_text(render_card(CardFacts("n", None, new_contract("combined"))))
    for value in (0.1, 0.2, 0.3):
        add_figures(card, {name: value})
    (row,) = [line for line in card.read_text().splitlines() if line.startswith("| dl20")]
    assert row == (
        "| dl20\\|\\`x\\` &lt;b&gt;\\*bm25\\*&lt;/b&gt; \\\\ \\_y\\_ $z$ [link]\\(http://x)/nDCG@10 | – | 0.3000 |"
    )
