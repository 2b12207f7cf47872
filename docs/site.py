"""What the site has besides docs/: the README as its start, the public interface, two files of the root."""

from __future__ import annotations

import re
from pathlib import Path

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
    return files


def interface() -> str:
    """The names of ``import stepscope as ss``, each with its docstring."""
    homes = {name: getattr(stepscope, name) for name in stepscope.__all__ if not name.startswith("_")}
    blocks = [f"::: {found.__module__}.{found.__qualname__}\n" for found in homes.values()]
    return "\n".join(["# Interface\n", "What `import stepscope` offers.\n", *blocks])
