"""What the site has besides docs/: the README, the public interface, two files of the root, the notebooks."""

from __future__ import annotations

import gzip
import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import stepscope

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; their links into docs/ are links beside them."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(),
        "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(),
        "API.md": interface(),
    }
    for name, text in pages.items():
        linked = re.sub(r"\]\((?:docs/|\.\./)", "](", text)
        files.append(File.generated(config, name, content=linked))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    (library,) = (ROOT / "src/stepscope/report/vendor").glob("plotly-*.js.gz")
    files.append(File.generated(config, "notebooks/plotly.js", content=gzip.decompress(library.read_bytes())))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A notebook is read as the page that is made of it."""
    return re.sub(r"(\]\([^)\s]+)\.ipynb\)", r"\1.md)", markdown)


DRAW = """<script src="plotly.js"></script>
<script>document.querySelectorAll(".plotly-figure").forEach((place) => {
  const figure = JSON.parse(place.dataset.figure);
  Plotly.newPlot(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
});</script>"""


def notebook(path: Path) -> str:
    """An executed notebook as a page: its cells, and below each what it showed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown(output) for output in cell.get("outputs", [])]
    return "\n\n".join([*parts, DRAW])


def shown(output: dict[str, Any]) -> str:
    """One output: a figure, else HTML, else text."""
    data = output.get("data", {})
    if (figure := data.get("application/vnd.plotly.v1+json")) is not None:
        height = int(figure["layout"].get("height", 400))
        kept = html.escape(json.dumps({"data": figure["data"], "layout": figure["layout"]}))
        return f'<div class="plotly-figure" style="height:{height}px" data-figure="{kept}"></div>'
    if "text/html" in data:
        return f"<div>{''.join(data['text/html'])}</div>"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"


def interface() -> str:
    """The names of ``import stepscope as ss``, each with its docstring."""
    homes = {name: getattr(stepscope, name) for name in stepscope.__all__ if not name.startswith("_")}
    blocks = [f"::: {found.__module__}.{found.__qualname__}\n" for found in homes.values()]
    return "\n".join(["# Interface\n", "What `import stepscope` offers.\n", *blocks])
