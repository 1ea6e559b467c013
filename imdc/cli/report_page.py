"""The report page of `imdc profile --html`: one file with its data, styles and script, and no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imdc import __version__
from imdc.cli.report_script import SCRIPT


def page(data: Mapping[str, Any]) -> str:
    """The page for the values of `imdc profile --json`."""
    # Only the name of a local folder is shown, because the page is made to be passed on.
    model = str(data["model"])
    name = Path(model).name if Path(model).exists() else model
    title = f"{name}: {data['prompt_tokens']:,} tokens"
    # "<" may not stand in a script element: a model's name could close it.
    values = json.dumps({**data, "model": name}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _PAGE.replace("%TITLE%", html.escape(title))
        .replace("%VERSION%", html.escape(__version__))
        .replace("%STYLE%", STYLE)
        .replace("%SCRIPT%", SCRIPT)
        .replace("%DATA%", values)
    )


# What all report pages look like, in light and dark; also of `bench/longbench.py`.
STYLE = """
:root {
  --surface: #ffffff; --ink: #1b1f24; --quiet: #5b6570; --line: #d9dee3; --plan: #1b1f24;
  --memory: #2f6db5; --workspace: #67a9a0; --working: #e0a13c; --chunk: #9a6bb3; --heat: 47, 109, 181;
}
@media (prefers-color-scheme: dark) {
  :root {
    --surface: #14171a; --ink: #e6e9ec; --quiet: #9aa4ae; --line: #333a41; --plan: #f1f3f5;
    --memory: #5b9be3; --workspace: #6fbdb2; --working: #e6b055; --chunk: #b48bcd; --heat: 91, 155, 227;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--surface); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 .25rem; }
p { margin: .25rem 0; color: var(--quiet); }
[role=tablist] { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; }
[role=tab] { font: inherit; color: var(--ink); background: none; border: 1px solid var(--line); border-radius: .4rem;
  padding: .4rem .9rem; cursor: pointer; }
[role=tab][aria-selected=true] { background: var(--ink); color: var(--surface); border-color: var(--ink); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 0; }
.figures div { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .75rem; }
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
svg, canvas { display: block; width: 100%; touch-action: pan-y; }
svg { height: 15rem; }
canvas { height: 14rem; border: 1px solid var(--line); image-rendering: pixelated; }
svg rect { shape-rendering: crispEdges; }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
.memory { fill: var(--memory); } .workspace { fill: var(--workspace); } .working { fill: var(--working); }
.chunk { fill: var(--chunk); }
.plan { fill: none; stroke: var(--plan); stroke-width: 1.5; stroke-dasharray: 5 3; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .85rem; color: var(--quiet); }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
.legend i.plan { width: 1.4em; height: 0; border-top: 2px dashed var(--plan); vertical-align: middle; }
[hidden] { display: none !important; }
#tip { position: absolute; pointer-events: none; background: var(--ink); color: var(--surface); padding: .4rem .6rem;
  border-radius: .3rem; font-size: .8rem; white-space: pre; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
@media (max-width: 30rem) { table { font-size: .75rem; } th, td { padding: .2rem .3rem; } }
summary { cursor: pointer; margin-top: 2rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>imdc profile - %TITLE%</title>
<style>%STYLE%</style>
</head>
<body>
<h1>%TITLE%</h1>
<p id="about"></p>
<div role="tablist" aria-label="Schedule" id="tabs"></div>
<dl class="figures">
  <div><dt>measured peak above weights</dt><dd id="measured"></dd></div>
  <div><dt>predicted</dt><dd id="predicted"></dd></div>
  <div><dt>difference</dt><dd id="difference"></dd></div>
  <div><dt>tokens per second</dt><dd id="speed"></dd></div>
</dl>
<h2>Memory above the weights, at the peak of every step</h2>
<div class="legend">
  <span><i style="background:var(--memory)"></i>memory of all layers</span>
  <span><i style="background:var(--workspace)"></i>workspace</span>
  <span><i style="background:var(--working)"></i>while a layer runs</span>
  <span><i class="plan"></i>predicted peak</span>
</div>
<svg id="bytes" role="img" aria-label="Bytes per step"></svg>
<h2>Schedule: what each step attends to, in tokens</h2>
<div class="legend">
  <span><i style="background:var(--memory)"></i>memory</span>
  <span><i style="background:var(--chunk)"></i>chunk</span>
</div>
<svg id="tokens" role="img" aria-label="Memory and chunk per step"></svg>
<h2>Peak inside each layer</h2>
<p>Steps from left to right, layers from top to bottom; darker or brighter is more.</p>
<canvas id="heat" role="img" aria-label="Peak bytes by layer and step"></canvas>
<h2>Retention</h2>
<p id="kept">Share of each layer's memory that survives a step, from 0% (pale) to 100%. Empty where there is no memory
yet.</p>
<p id="nothing">No memory was compressed: one step reads everything.</p>
<canvas id="retention" role="img" aria-label="Retention by layer and step"></canvas>
<h2>All schedules</h2>
<div class="scroll"><table id="compare"></table></div>
<p id="saving"></p>
<details><summary>All steps as a table</summary><div class="scroll"><table id="steps"></table></div></details>
<p>imdc %VERSION%</p>
<div id="tip" hidden></div>
<script type="application/json" id="data">%DATA%</script>
<script>%SCRIPT%</script>
</body>
</html>
"""
