"""`compare`: two or more runs, or results of `rerank`, query by query."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankllm_composer.cli import main
from rankllm_composer.errors import RunError
from rankllm_composer.ranking.compare_files import compare_files
from rankllm_composer.ranking.comparison import MeasureComparison, RerankResult, compare, write_rerank_result

JUDGMENTS = "q1 0 x 1\nq2 0 x 1\nq3 0 y 2\nq4 0 z 1\n"


def write_run(path: Path, rankings: dict[str, str]) -> Path:
    """Rankings as in {"q1": "xy"}: document x before y."""
    lines = (
        f"{qid} Q0 {docid} {rank} {-rank} t\n"
        for qid, docids in rankings.items()
        for rank, docid in enumerate(docids, start=1)
    )
    path.write_text("".join(lines))
    return path


@pytest.fixture
def files(tmp_path):
    (tmp_path / "qrels").write_text(JUDGMENTS)
    write_run(tmp_path / "a.trec", {"q1": "ax", "q2": "xa", "q3": "ay"})
    write_run(tmp_path / "b.trec", {"q1": "xa", "q2": "ax", "q3": "ya", "unjudged": "a"})
    write_run(tmp_path / "c.trec", {"q1": "xa"})
    return tmp_path


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_two_runs_are_compared_by_every_measure(files, capsys):
    """Of trec_eval's and of ir-measures' names, with the share of judged documents beside nDCG."""
    given = (files / "a.trec", files / "b.trec", "--judgments", files / "qrels")
    code, out, err = run(capsys, *given, "-m", "recip_rank", "-m", "ndcg@2", "--per-query", files / "values.tsv")
    assert code == 0 and "error" not in err
    lines = out.splitlines()
    assert lines[0] == "A = a.trec, B = b.trec: 3 queries"
    assert lines[1] == "1 judged query in neither run, such as q4: left out; --complete counts 0 for it"
    table = {line.split()[0]: line.split() for line in lines[3:6]}
    assert table["RR"][1:6] == ["0.6667", "→", "0.8333", "+0.1667", "2/0/1"]  # 1/2, 1, 1/2 and 1, 1/2, 1
    assert table["Judged@2"][1:5] == ["0.5000", "→", "0.5000", "+0.0000"] and "nDCG@2" in table
    assert "RR  gained  0.5000 → 1.0000  +0.5000  query q1" in lines
    rows = [line.split("\t") for line in (files / "values.tsv").read_text().splitlines()]
    assert rows[0] == ["measure", "query", "a.trec", "b.trec"]
    assert ["RR", "q2", "1.000000", "0.500000"] in rows and len(rows) == 1 + 3 * 3


def test_a_query_that_a_run_lacks_is_left_out_or_counts_as_zero(files, capsys):
    given = (files / "a.trec", files / "c.trec", files / "b.trec", "--qrels", files / "qrels", "-m", "RR", "--json")
    first, second = json.loads(run(capsys, *given)[1])["comparisons"]
    assert (first["first"], first["second"], second["second"]) == ("a.trec", "c.trec", "b.trec")
    (row,) = first["measures"]
    assert (row["measure"], row["num_queries"], row["first_mean"], row["second_mean"]) == ("RR", 1, 0.5, 1.0)
    assert "2 judged queries only in a.trec" in first["notes"][0]
    first, _ = json.loads(run(capsys, *given, "-c")[1])["comparisons"]
    (row,) = first["measures"]
    assert (row["num_queries"], row["first_mean"], row["second_mean"]) == (4, 0.5, 0.25)
    assert (row["wins"], row["ties"], row["losses"]) == (1, 1, 2)


def test_results_of_rerank_are_compared_without_judgments(tmp_path, capsys):
    values = {"old": {"1": 0.25, "2": 0.5}, "new": {"1": 0.75, "2": 0.5, "3": 1.0}}
    for name, reranked in values.items():
        first = dict.fromkeys(reranked, 0.0)
        rows = (MeasureComparison("nDCG@10", compare(first, reranked), first, reranked),)
        write_rerank_result(tmp_path / f"{name}.figures.json", RerankResult("s", name, "first_token", rows))
    pair = tmp_path / "old.figures.json", tmp_path / "new.figures.json"
    (found,) = compare_files(pair)
    assert (found.comparisons[0].comparison.first_mean, found.comparisons[0].comparison.second_mean) == (0.375, 0.625)
    assert found.notes == ("nDCG@10: 1 query only in one of the two, left out",)
    assert (
        "0.3750 → 0.6250" in run(capsys, *pair)[1] and "0.3750 → 0.6250" in run(capsys, *pair, "-m", "ndcg_cut_10")[1]
    )
    code, _, err = run(capsys, *pair, "-m", "RR@10")
    assert code == 2 and "old.figures.json lacks RR@10; it has nDCG@10. Name one of these" in err
    write_run(tmp_path / "a.trec", {"1": "ax"})
    for given in ((*pair, "--qrels", "q"), (*pair, "-c"), (pair[0], tmp_path / "a.trec", "--qrels", "q")):
        code, _, err = run(capsys, *given)
        assert code == 2 and "old.figures.json holds the values of each query and no ranking; expected runs" in err


def test_what_cannot_be_compared_is_refused(files, capsys):
    code, out, err = run(capsys, files / "a.trec", files / "b.trec", "--json")
    assert code == 2 and "without judgments; expected --qrels" in err and json.loads(out)["error"] in err
    code, _, err = run(capsys, files / "a.trec", "--qrels", files / "qrels")
    assert code == 2 and "compare is given 1 file; expected two or more" in err
    with pytest.raises(RunError, match=r"expected a name of ir-measures, .* or of trec_eval"):
        compare_files([files / "a.trec", files / "b.trec"], files / "qrels", measures=["nGCG@10"])
