"""A class matrix to point at: names and value of the cell under the pointer or the arrow keys, without a network."""

import base64
import html
import json
from string import Template

import numpy as np
import xarray as xr

UNIT = 10_000  # values are kept as whole multiples of 1 / UNIT
NOTHING = -32_768  # stands for NaN

_PAGE = Template("""<div class="hovering" id="$id">
<label>Stage <select>$options</select></label>
<canvas width="$side" height="$side" tabindex="0" role="application" aria-label="$label" aria-describedby="$id-cell"
 style="width: 100%; max-width: 600px; aspect-ratio: 1; image-rendering: pixelated; display: block; cursor: crosshair">
</canvas>
<output id="$id-cell" aria-live="polite" style="display: block; min-height: 3.2em">
Point at a cell, or use the arrow keys.</output>
<script>
(() => {
  const box = document.getElementById("$id"), canvas = box.querySelector("canvas"), out = box.querySelector("output");
  const choice = box.querySelector("select"), names = $names, groups = $groups, n = names.length, size = $size;
  const bytes = Uint8Array.from(atob("$values"), c => c.charCodeAt(0));
  const values = new Int16Array(bytes.buffer), pen = canvas.getContext("2d"), drawn = {};
  let at = [0, 0];
  const value = (a, b) => values[(choice.selectedIndex * n + a) * n + b];
  const colour = v => {
    if (v === $nothing) return "gray";
    const s = Math.sqrt(Math.abs(v) / $unit), end = v < 0 ? [103, 0, 31] : [5, 48, 97];
    return "rgb(" + end.map(c => Math.round(247 + (c - 247) * s)).join() + ")";
  };
  const stage = () => {
    const known = drawn[choice.selectedIndex];
    if (known) return known;
    const copy = document.createElement("canvas");
    copy.width = copy.height = n * size;
    const ink = copy.getContext("2d");
    for (let a = 0; a < n; a++) for (let b = 0; b < n; b++) {
      ink.fillStyle = colour(value(a, b));
      ink.fillRect(b * size, a * size, size, size);
    }
    ink.fillStyle = "black";
    for (let k = 1; k < n; k++) if (groups[k] !== groups[k - 1]) {
      ink.fillRect(k * size, 0, 1, n * size);
      ink.fillRect(0, k * size, n * size, 1);
    }
    return drawn[choice.selectedIndex] = copy;
  };
  const say = (a, b) => {
    at = [a, b];
    pen.drawImage(stage(), 0, 0);
    pen.strokeStyle = "black";
    pen.lineWidth = 2;
    pen.strokeRect(b * size, a * size, size, size);
    const v = value(a, b), text = v === $nothing ? "no value" : (v / $unit).toFixed(3).replace("-", "\\u2212");
    out.textContent = "A step on " + names[a] + " (" + groups[a] + "), the loss of " + names[b] + " (" + groups[b]
      + "): " + text;
  };
  const cell = x => Math.max(0, Math.min(n - 1, x));
  const place = e => {
    const r = canvas.getBoundingClientRect();
    say(cell(Math.floor((e.clientY - r.top) / r.height * n)), cell(Math.floor((e.clientX - r.left) / r.width * n)));
  };
  canvas.addEventListener("pointermove", place);
  canvas.addEventListener("pointerdown", place);
  canvas.addEventListener("focus", () => say(...at));
  canvas.addEventListener("keydown", e => {
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
    if (!move) return;
    e.preventDefault();
    say(...at.map((k, i) => cell(k + move[i])));
  });
  choice.addEventListener("change", () => say(...at));
  pen.drawImage(stage(), 0, 0);
})();
</script>
</div>""")


def matrix(C: xr.DataArray, label: str, identifier: str = "class-matrix") -> str:
    """HTML of a class matrix whose cells say their names and their value.

    Args:
        C: (stage, class_a, class_b), values in [-1, 1]; classes have names, and the coordinate `superclass`, whose
            changes are marked by lines.
        label: what a reader who does not see it is told.
        identifier: of the element, letters and dashes; a page with two of them needs two names.

    Returns:
        HTML with its script, some 3 bytes a cell and stage; values are rounded to 1/10000, NaN is grey.

    """
    n = C.sizes["class_a"]
    values = UNIT * C.transpose("stage", "class_a", "class_b").values
    stored = np.where(np.isnan(values), NOTHING, np.round(np.nan_to_num(values))).astype("<i2")
    size = max(4, 600 // n)
    return _PAGE.substitute(
        id=html.escape(identifier, quote=True),
        options="".join(f"<option>{html.escape(str(stage))}</option>" for stage in C.stage.values),
        label=html.escape(label, quote=True),
        names=_script(C.class_a.values),
        groups=_script(C.superclass.values),
        size=size,
        side=size * n,
        unit=UNIT,
        nothing=NOTHING,
        values=base64.b64encode(stored.tobytes()).decode(),
    )


def _script(names: np.ndarray) -> str:
    """Names as they are spoken, as JSON that may stand inside a script element."""
    return json.dumps([str(name).replace("_", " ") for name in names]).replace("<", "\\u003c")
