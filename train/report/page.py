"""`report.html`: one page with everything in it, for any browser, without network."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import scconv_jax

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0 auto;max-width:980px;padding:16px;font:16px/1.5 system-ui,sans-serif;color:#1d232b;background:#fff}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid #d9dee5;padding-bottom:.2rem}
p{margin:.5rem 0}.muted{color:#596472}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:1rem 0}
.figures div{border:1px solid #d9dee5;border-radius:8px;padding:8px 12px}.figures b{display:block;font-size:1.3rem}
.wide{overflow-x:auto;margin:.5rem 0}img{max-width:100%;height:auto}.wide img.large{max-width:none;width:860px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:12px}
.cards figure{margin:0;border:1px solid #d9dee5;border-radius:8px;padding:8px;font-size:.85rem;
  overflow-wrap:anywhere}
.cards img{width:100%;image-rendering:pixelated;background:#eee;display:block;margin-bottom:6px}
table{border-collapse:collapse;font-size:.9rem}th,td{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid #eef0f3}
td.number,th.number{text-align:right}td{overflow-wrap:anywhere;vertical-align:top}
details{margin:.6rem 0}summary{cursor:pointer}.scroll{max-height:420px;overflow:auto}
"""


def text(value: object) -> str:
    """Return text for the page, in which nothing is markup."""
    return html.escape(scconv_jax.messages.printable(value))


def picture(path: Path, description: str, kind: str = "") -> str:
    """Return a PNG file as part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img class="{kind}" alt="{text(description)}" src="data:image/png;base64,{data}"></div>'


def pixels(image: np.ndarray) -> str:
    """Return an image, uint8 (h, w, c), as the address of a PNG that is part of the page."""
    from PIL import Image

    file = io.BytesIO()
    found = Image.fromarray(image.squeeze())
    found.thumbnail((256, 256))
    found.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def cards(rows: Iterable[tuple[np.ndarray, str, str, float]]) -> str:
    """Return images with their true and predicted class and the confidence of the prediction."""
    made = (
        f'<figure><img alt="" src="{pixels(image)}"><figcaption><b>{text(predicted)}</b> {confidence:.1%}<br>'
        f"true: {text(true)}</figcaption></figure>"
        for image, true, predicted, confidence in rows
    )
    return f'<div class="cards">{"".join(made)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers are aligned to the right."""

    def cell(value: Any, kind: str = "td") -> str:
        return f"<{kind}{' class=number' * (not isinstance(value, str))}>{text(value)}</{kind}>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    first = f"<thead><tr>{''.join(f'<th>{text(name)}</th>' for name in head)}</tr></thead>" if head else ""
    return f'<div class="wide scroll"><table>{first}<tbody>{body}</tbody></table></div>'


def details(title: str, content: str) -> str:
    """Return a part of the page that opens on a click."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def page(title: str, subtitle: str, figures: dict[str, str], sections: Iterable[tuple[str, str]]) -> str:
    """Return the page: large `figures` by name, then sections with a title and HTML each."""
    boxes = "".join(f"<div><b>{text(value)}</b>{text(name)}</div>" for name, value in figures.items())
    body = "".join(f"<section><h2>{text(name)}</h2>{content}</section>" for name, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{text(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{text(title)}</h1>'
        f'<p class="muted">{text(subtitle)}</p><div class="figures">{boxes}</div>{body}</body></html>\n'
    )
