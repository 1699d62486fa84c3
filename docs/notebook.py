"""The demo as a notebook: `python docs/notebook.py` executes examples/demo.py and writes examples/demo.ipynb.

mkdocs loads this module as a hook, which adds the examples to the website and, if there is one, the notebook as a page.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "demo.ipynb"
Cell = dict[str, Any]


def split_cells(text: str) -> list[tuple[str, str]]:
    """Split percent format into (markdown or code, source) pairs."""
    found = re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text, re.DOTALL | re.MULTILINE)
    uncommented = re.compile(r"^# ?", re.MULTILINE)
    return [
        ("markdown", uncommented.sub("", code.strip())) if marked else ("code", code.strip()) for marked, code in found
    ]


def execute(source: str, namespace: dict[str, Any]) -> list[Cell]:
    """Run a cell and return its outputs: what it printed, and its figures as PNG."""
    import matplotlib.pyplot as plt

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        exec(compile(source, "demo.py", "exec"), namespace)
    outputs: list[Cell] = []
    if lines := printed.getvalue().replace(f"{Path.cwd()}/", "").splitlines(keepends=True):
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def build_notebook(text: str) -> Cell:
    """Execute a source in percent format from top to bottom, as a notebook of format 4.5."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells: list[Cell] = []
    for number, (kind, source) in enumerate(split_cells(text), start=1):
        lines = source.splitlines(keepends=True)
        cell: Cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
        if kind == "code":
            cell |= {"execution_count": number, "outputs": execute(source, namespace)}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def as_markdown(notebook: Cell) -> str:
    """Write a notebook as a page, with its pictures in it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text'])}```")
            else:
                parts.append(f"![figure](data:image/png;base64,{output['data']['image/png']})")
    return re.sub(r"\]\((\w+\.py)\)", r"](examples/\1)", "\n\n".join(parts))


def on_config(config: Any) -> Any:
    """List the notebook behind the page of examples."""
    for pages in (section[name] for section in config.nav if isinstance(section, dict) for name in section):
        if NOTEBOOK.exists() and "examples.md" in pages:
            pages.insert(pages.index("examples.md") + 1, "demo.md")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the examples and the notebook to the website."""
    from mkdocs.structure.files import File, InclusionLevel

    added = {f"examples/{path.name}": path.read_text() for path in EXAMPLES.iterdir() if path.is_file()}
    if NOTEBOOK.exists():
        added["demo.md"] = as_markdown(json.loads(NOTEBOOK.read_text()))
    for name, content in added.items():
        files.append(File.generated(config, name, content=content, inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links into the repository's examples lead to their copies in the website."""
    return markdown.replace("](../examples/demo.ipynb)", "](demo.md)").replace("](../examples/", "](examples/")


def main() -> None:
    """Execute examples/demo.py in the current folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=NOTEBOOK)
    output = parser.parse_args().output
    notebook = build_notebook((EXAMPLES / "demo.py").read_text())
    output.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("agg")
    main()
