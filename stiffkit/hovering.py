"""A class matrix to point at: names and value of the cell under the pointer or the arrow keys, without a network."""

import base64
import html
import json
from string import Template

import numpy as np
import xarray as xr

_PAGE = Template("""<div class="hovering" id="$id">
<label>Stage <select>$options</select></label>
<canvas width="$side" height="$side" tabindex="0" role="img" aria-label="$label"
 style="width: 100%; max-width: 600px; aspect-ratio: 1; image-rendering: pixelated; display: block; cursor: crosshair">
</canvas>
<output aria-live="polite" style="display: block; min-height: 3.2em">Point at a cell, or use the arrow keys.</output>
<script>
(() => {
  const box = document.getElementById("$id"), canvas = box.querySelector("canvas"), out = box.querySelector("output");
  const choice = box.querySelector("select"), names = $names, groups = $groups, n = names.length, size = $size;
  const bytes = Uint8Array.from(atob("$values"), c => c.charCodeAt(0));
  const values = new Int16Array(bytes.buffer), pen = canvas.getContext("2d");
  let at = [0, 0];
  const value = (a, b) => values[(choice.selectedIndex * n + a) * n + b] / 10000;
  const colour = v => {
    const s = Math.sqrt(Math.abs(v)), end = v < 0 ? [178, 24, 43] : [33, 102, 172];
    return "rgb(" + end.map(c => Math.round(247 + (c - 247) * s)).join() + ")";
  };
  const draw = () => {
    for (let a = 0; a < n; a++) for (let b = 0; b < n; b++) {
      pen.fillStyle = colour(value(a, b));
      pen.fillRect(b * size, a * size, size, size);
    }
    pen.fillStyle = "black";
    for (let k = 1; k < n; k++) if (groups[k] !== groups[k - 1]) {
      pen.fillRect(k * size, 0, 1, n * size);
      pen.fillRect(0, k * size, n * size, 1);
    }
  };
  const say = (a, b) => {
    at = [a, b];
    draw();
    pen.strokeStyle = "black";
    pen.lineWidth = 2;
    pen.strokeRect(b * size, a * size, size, size);
    const text = v => v.toFixed(3).replace("-", "\\u2212");
    out.textContent = "A step on " + names[a] + " (" + groups[a] + "), the loss of " + names[b] + " (" + groups[b]
      + "): " + text(value(a, b));
  };
  const place = e => {
    const r = canvas.getBoundingClientRect();
    const cell = x => Math.max(0, Math.min(n - 1, Math.floor(x * n)));
    say(cell((e.clientY - r.top) / r.height), cell((e.clientX - r.left) / r.width));
  };
  canvas.addEventListener("pointermove", place);
  canvas.addEventListener("pointerdown", place);
  canvas.addEventListener("keydown", e => {
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
    if (!move) return;
    e.preventDefault();
    say(...at.map((k, i) => Math.max(0, Math.min(n - 1, k + move[i]))));
  });
  choice.addEventListener("change", () => say(...at));
  draw();
})();
</script>
</div>""")


def matrix(C: xr.DataArray, label: str, identifier: str = "class-matrix") -> str:
    """HTML of a class matrix whose cells say their names and their value.

    Args:
        C: (stage, class_a, class_b), values in [-1, 1]; classes have names, and the coordinate `superclass`, whose
            changes are marked by lines.
        label: what a reader who does not see it is told.
        identifier: of the element; a page with two of them needs two names.

    Returns:
        HTML with its script, some 8 bytes a cell and stage; values are rounded to 1/10000, NaN is shown as zero.

    """
    n = C.sizes["class_a"]
    values = np.round(10_000 * np.nan_to_num(C.transpose("stage", "class_a", "class_b").values)).astype("<i2")
    size = max(4, 600 // n)
    return _PAGE.substitute(
        id=identifier,
        options="".join(f"<option>{html.escape(str(stage))}</option>" for stage in C.stage.values),
        label=html.escape(label, quote=True),
        names=_script([str(name) for name in C.class_a.values]),
        groups=_script([str(name) for name in C.superclass.values]),
        size=size,
        side=size * n,
        values=base64.b64encode(values.tobytes()).decode(),
    )


def _script(value: list[str]) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value).replace("<", "\\u003c")
