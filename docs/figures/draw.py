"""Draws the figures of the documentation as SVG: `python docs/figures/draw.py` writes them beside this file.

The shapes have classes. Each file has colours for a light and a dark background; the site gives its own (`static/site.css`).
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
text { font: 14px system-ui, sans-serif; text-anchor: middle; dominant-baseline: central; fill: #1b2330; }
.quiet { font-size: 12px; fill: #5a6472; }
.start { text-anchor: start; }
.box { fill: #f3f5f9; stroke: #b9c1ce; } .strong { fill: #f3f5f9; stroke: #1d4ed8; stroke-width: 2; }
.gate { fill: #fff6e6; stroke: #c77700; stroke-width: 2; }
.line { fill: none; stroke: #5a6472; } .arrow { fill: #5a6472; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ef; } .quiet { fill: #a3adbb; }
  .box, .strong { fill: #20252e; stroke: #4a5464; } .strong { stroke: #8fb4ff; } .gate { fill: #2e2718; stroke: #f0a832; }
  .line { stroke: #a3adbb; } .arrow { fill: #a3adbb; }
}
"""


class Drawing:
    """An SVG of boxes, circles and arrows. Positions are centres, in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, text: str, note: str = "", *, kind: str = "box", width: float = 84, height: float = 34
    ) -> None:
        """Draw a box with a text, and a note below it."""
        left, top = x - width / 2, y - height / 2
        self.parts.append(f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="6"/>')
        lines = text.split("\n")
        for number, line in enumerate(lines):
            self.text(x, y + 17 * (number - (len(lines) - 1) / 2), line)
        if note:
            self.note(x, y + height / 2 + 11, note)

    def circle(self, x: float, y: float, text: str, kind: str = "gate") -> None:
        """Draw an operation on whole maps: a sum, a product, a sigmoid."""
        self.parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="15"/>')
        self.text(x, y, text)

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Write a line of text."""
        self.parts.append(f'<text{f" class={chr(34)}{kind}{chr(34)}" if kind else ""} x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def note(self, x: float, y: float, text: str) -> None:
        """Write a line of small text."""
        self.text(x, y, text, "quiet")

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through points with a head at the last."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        path = " ".join(f"{a:g},{b:g}" for a, b in points)
        self.parts.append(f'<polyline class="line" points="{path}"/>')
        wing = f"{x - 8 * dx - 4 * dy:g},{y - 8 * dy - 4 * dx:g} {x - 8 * dx + 4 * dy:g},{y - 8 * dy + 4 * dx:g}"
        self.parts.append(f'<polygon class="arrow" points="{x:g},{y:g} {wing}"/>')

    def svg(self) -> str:
        """Return the file's text."""
        width, height = self.size
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">\n'
            f"<style>{STYLE}</style>\n{body}\n</svg>\n"
        )


def self_calibrated() -> Drawing:
    """Liu et al., CVPR 2020, Fig. 2 and Eqs. 3-6."""
    d = Drawing(800, 325)
    d.box(50, 165, "X", "c channels", width=60)
    d.box(170, 125, "X1", "c/2", width=56)
    d.box(170, 285, "X2", "c/2", width=56)
    d.arrow((80, 165), (110, 165), (110, 125), (142, 125))
    d.arrow((80, 165), (110, 165), (110, 285), (142, 285))
    # The gate: context of a larger area.
    d.box(285, 45, "average\npool", "r = 4", width=84, height=46)
    d.box(395, 45, "K2", "conv 3×3", kind="strong", width=64)
    d.box(495, 45, "upsample", "nearest", width=84)
    d.arrow((170, 108), (170, 45), (243, 45))
    d.arrow((327, 45), (363, 45))
    d.arrow((427, 45), (453, 45))
    d.circle(580, 45, "+")
    d.circle(580, 125, "σ")
    d.arrow((537, 38), (566, 38))
    d.arrow((198, 115), (225, 115), (225, 95), (545, 95), (545, 52), (566, 52))
    d.arrow((580, 60), (580, 110))
    d.note(640, 125, "gate, 0 to 1")
    # The branch that is gated.
    d.box(395, 195, "K3", "conv 3×3", kind="strong", width=64)
    d.arrow((198, 135), (225, 135), (225, 195), (363, 195))
    d.circle(580, 195, "×")
    d.arrow((427, 195), (565, 195))
    d.arrow((580, 140), (580, 180))
    d.box(660, 195, "K4", "conv 3×3", kind="strong", width=64)
    d.arrow((595, 195), (628, 195))
    d.box(395, 285, "K1", "conv 3×3", kind="strong", width=64)
    d.arrow((198, 285), (363, 285))
    d.box(750, 240, "Y", "[Y1, Y2]", width=56)
    d.arrow((692, 195), (750, 195), (750, 223))
    d.arrow((427, 285), (700, 285), (700, 240), (722, 240))
    return d


def spatial_reconstruction() -> Drawing:
    """Li et al., CVPR 2023, Eqs. 1-4."""
    d = Drawing(800, 270)
    d.box(45, 135, "X", "c channels", width=60)
    d.box(165, 55, "group norm", "γ, β", kind="strong", width=96)
    d.arrow((45, 118), (45, 55), (117, 55))
    d.box(300, 55, "σ(γ/Σγ · GN)", "weight W of each value", width=116)
    d.arrow((213, 55), (242, 55))
    d.box(440, 55, "W > 0.5 ?", kind="gate", width=84)
    d.arrow((358, 55), (398, 55))
    d.circle(520, 110, "×")
    d.circle(520, 200, "×")
    d.arrow((482, 55), (520, 55), (520, 95))
    d.note(548, 76, "W1")
    d.arrow((440, 72), (440, 155), (520, 155), (520, 185))
    d.note(458, 143, "W2")
    d.arrow((75, 130), (300, 130), (300, 110), (505, 110))
    d.arrow((75, 140), (300, 140), (300, 200), (505, 200))
    d.box(615, 110, "X1", "informative", width=64)
    d.box(615, 200, "X2", "redundant", width=64)
    d.arrow((535, 110), (583, 110))
    d.arrow((535, 200), (583, 200))
    d.box(735, 155, "Y", "halves crossed", width=60)
    d.arrow((647, 110), (680, 110), (680, 148), (705, 148))
    d.arrow((647, 200), (680, 200), (680, 162), (705, 162))
    d.note(735, 206, "[X11 + X22,")
    d.note(735, 222, "X12 + X21]")
    return d


def channel_reconstruction() -> Drawing:
    """Li et al., CVPR 2023, Eqs. 5-9."""
    d = Drawing(800, 320)
    d.box(45, 160, "X", "c channels", width=60)
    d.box(165, 90, "Xup", "α c", width=64)
    d.box(165, 240, "Xlow", "(1 − α) c", width=64)
    d.arrow((75, 160), (105, 160), (105, 90), (133, 90))
    d.arrow((75, 160), (105, 160), (105, 240), (133, 240))
    d.box(275, 90, "1×1", "squeeze by r = 2", kind="strong", width=64)
    d.box(275, 240, "1×1", "squeeze by r = 2", kind="strong", width=64)
    d.arrow((197, 90), (243, 90))
    d.arrow((197, 240), (243, 240))
    d.box(405, 45, "GWC", "k×k, 2 groups", kind="strong", width=64)
    d.box(405, 130, "PWC1", "1×1", kind="strong", width=64)
    d.arrow((307, 85), (330, 85), (330, 45), (373, 45))
    d.arrow((307, 95), (330, 95), (330, 130), (373, 130))
    d.circle(495, 90, "+", "box")
    d.arrow((437, 45), (495, 45), (495, 75))
    d.arrow((437, 130), (495, 130), (495, 105))
    d.box(405, 215, "PWC2", "1×1", kind="strong", width=64)
    d.arrow((307, 235), (330, 235), (330, 215), (373, 215))
    d.arrow((307, 250), (473, 250))
    d.box(505, 245, "concat", width=64)
    d.arrow((437, 215), (455, 215), (455, 238), (473, 238))
    # The averages of both decide, channel by channel, which counts how much.
    d.box(610, 165, "averages,\nsoftmax", width=84, height=46, kind="gate")
    d.arrow((510, 90), (610, 90), (610, 142))
    d.arrow((537, 245), (610, 245), (610, 188))
    d.note(568, 76, "Y1")
    d.note(568, 260, "Y2")
    d.circle(690, 90, "×")
    d.circle(690, 245, "×")
    d.arrow((610, 90), (675, 90))
    d.arrow((610, 245), (675, 245))
    d.arrow((652, 157), (690, 157), (690, 105))
    d.arrow((652, 173), (690, 173), (690, 230))
    d.note(707, 130, "β1")
    d.note(707, 200, "β2")
    d.box(760, 165, "Y, sum", width=64)
    d.arrow((705, 90), (760, 90), (760, 148))
    d.arrow((705, 245), (760, 245), (760, 182))
    return d


def training() -> Drawing:
    """What a batch passes through, from files to the run's folder."""
    d = Drawing(800, 250)
    for x, text, note in (
        (75, "image files or\na prepared set", "read in a shuffled order"),
        (250, "threads", "decode, crop, flip"),
        (425, "batch of a host", "depends on seed and step"),
        (600, "devices", ""),
    ):
        d.box(x, 50, text, note, width=128, height=54)
    for x in (139, 314, 489):
        d.arrow((x, 50), (x + 47, 50))
    d.note(512, 32, "two")
    d.note(512, 68, "ahead")
    d.box(600, 165, "step, on each device", "gradient, all-reduce, update", kind="strong", width=170, height=48)
    d.arrow((600, 77), (600, 141))
    d.arrow((685, 165), (740, 165), (740, 50), (664, 50))
    d.note(678, 108, "new state")
    d.box(300, 165, "run's folder", width=128, height=48)
    d.arrow((515, 165), (364, 165))
    d.note(440, 150, "metrics, state")
    d.note(300, 204, "config.json, metrics.jsonl,")
    d.note(300, 220, "curves.png, checkpoints/")
    d.arrow((236, 165), (75, 165), (75, 102))
    d.note(155, 150, "--resume: this step")
    return d


FIGURES = {
    "self_calibrated": self_calibrated,
    "spatial_reconstruction": spatial_reconstruction,
    "channel_reconstruction": channel_reconstruction,
    "training": training,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw().svg())
