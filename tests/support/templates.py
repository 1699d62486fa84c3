"""Prompt templates of one's own, as YAML files."""

from __future__ import annotations

LETTERS = r"""
output_validation_regex: r"^\[[A-Z]\]( > \[[A-Z]\])*$"
output_extraction_regex: r"\[([A-Z])\]"
"""
NUMBERS = r"""
output_validation_regex: r"^\[\d+\]( > \[\d+\])*$"
output_extraction_regex: r"\[(\d+)\]"
"""
TEMPLATES = {  # name → style, file
    "own_words": (
        "letters",
        'method: "singleturn_listwise"\nsystem_message: "You sort texts."\n'
        "prefix: |\n  Question: {query}\n  There are {num} texts.\n\nbody: |\n  [{rank}] {candidate}\n\n"
        "suffix: |-\n  Sort them: [B] > [A]." + LETTERS,
    ),
    "no_system_message": (
        "numbers",
        "method: singleturn_listwise\nbody: '<doc {rank}>{candidate}</doc>'\nsuffix: '{query}'" + NUMBERS,
    ),
    "query_first_and_braces": (
        "letters",
        'method: singleturn_listwise\nprefix: "{{\\"q\\": \\"{query}\\"}} – {num} №\\n"\n'
        'body: "{rank}. {candidate}  \\n"\n'
        'system_message: "Antworten Sie als {\\"a\\": 1}. Grüße"' + LETTERS,
    ),
    "names_of_passages": (
        "numbers",
        'method: singleturn_listwise\nprefix: ""\nbody: |-\n  [{rank}]\n  {candidate}\n'
        "suffix: |\n\n  {psg_ids} {query} {num}\n  output_validation: as asked" + NUMBERS,
    ),
    "patterns_as_they_are": (
        "letters",
        "method: singleturn_listwise\nprefix: 'Q {query}: '\nbody: '[{rank}] {candidate} '\n"
        "output_validation_regex: '^[A-Z\\[\\]> ]{5,400}$'\noutput_extraction_regex: '[A-Z]'\n",
    ),
}
