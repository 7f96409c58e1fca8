"""Equations as MathML, converted while the site is built: browsers draw it without a script."""

import xml.etree.ElementTree as etree
from typing import Any

from latex2mathml import converter
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor


class MathML(Extension):
    """Replace what `pymdownx.arithmatex` found by MathML."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(
            _Convert(md), "mathml", 15
        )  # after inline patterns (20), before pretty printing (10)


class _Convert(Treeprocessor):
    def run(self, root: etree.Element) -> None:
        for element in root.iter():
            if "arithmatex" in element.get("class", "").split():
                tex, display = str(element.text), "block" if element.tag == "div" else "inline"
                element.text = None
                element.append(converter.convert_to_element(tex.strip()[2:-2], display=display))


def makeExtension(**options: Any) -> MathML:
    return MathML(**options)
