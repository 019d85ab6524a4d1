"""HTML pages of both stages: one self-contained file each, from a template that escapes it all.

The template lies in its package; `charts.html`, with the look and the charts, lies in this one.
"""

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader


def write_page(package: str, template: str, path: Path, **values: Any) -> None:
    """Everything reaches the page escaped: a corpus, a label or a folder's name may hold markup."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("shared.pages")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    html = environment.get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html.lstrip(), encoding="utf-8")
