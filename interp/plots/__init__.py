"""Figures: the only place that knows colours, and the only way text gets into a figure.

Colours have a fixed meaning on every page: blue is the base model, vermillion the tuned one; differences run
from blue (less in tuned) over white (0) to vermillion (more in tuned); grey is what lies under the numerical
floor, beige what has no value. The palette is that of Okabe & Ito (2008), whose colours stay apart under the common colour-vision
deficiencies; base and tuned also differ in marker, dash and hatching.

Plotly interprets markup in every text, merges equal axis labels and reads "2024" or "1e3" as numbers. So the
functions here take plain text and escape it, and labelled axes are integers with tick texts (:func:`axis`,
:func:`token_axis`). They take tensors, arrays and lists alike.
"""

from interp.plots.boxes import boxes
from interp.plots.circuit import layered_graph
from interp.plots.colours import BASE, DIFFERENCE, FLOOR, INK, MAGNITUDE, OTHERS, TUNED, colour, shade
from interp.plots.figures import bars, heatmap, lines, scatter
from interp.plots.frame import FONT, HEIGHT, MONO, axis, figure, template, token_axis
from interp.plots.text import escape, label, visible, wrap
from interp.plots.tokens import coloured_tokens

__all__ = [
    "BASE",
    "DIFFERENCE",
    "FLOOR",
    "FONT",
    "HEIGHT",
    "INK",
    "MAGNITUDE",
    "MONO",
    "OTHERS",
    "TUNED",
    "axis",
    "bars",
    "boxes",
    "colour",
    "coloured_tokens",
    "escape",
    "figure",
    "heatmap",
    "label",
    "layered_graph",
    "lines",
    "scatter",
    "shade",
    "template",
    "token_axis",
    "visible",
    "wrap",
]
