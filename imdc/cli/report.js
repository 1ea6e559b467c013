"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const LEFT = 64, RIGHT = 8, TOP = 10, BOTTOM = 22;
let shown = 0;

function bytes(amount) {
  let unit = 0;
  while (Math.abs(amount) >= 1024 && unit < 4) { amount /= 1024; unit += 1; }
  const digits = unit === 0 || Math.abs(amount) >= 100 ? 0 : Math.abs(amount) >= 10 ? 1 : 2;
  return amount.toFixed(digits) + " " + UNITS[unit];
}
const count = (value) => Math.round(value).toLocaleString("en-US");
const percent = (share) => ((100 * share).toFixed(1) + "%").replace("-0.0", "0.0").replace(/^(?=\d)/, "+");
const above = (footprint) => footprint.memory + footprint.workspace + footprint.activations + footprint.attention
  + footprint.scoring + footprint.logits;

/* Memory at the end of a step, what is held beside it, and what the peak had on top. */
function parts(step) {
  const memory = Math.min(step.kv_bytes, step.peak_bytes);
  const held = Math.min(Math.max(step.held_bytes, memory), step.peak_bytes);
  return [["memory", memory], ["workspace", held - memory], ["working", step.peak_bytes - held]];
}

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

/* A round number at or above the highest value, so that all schedules share one readable axis. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = Math.pow(10, Math.floor(Math.log10(value)));
  return power * [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10].find((lead) => lead >= value / power - 1e-9);
}
/* Round in the unit of the highest value, in which all labels are then. */
function bytesAxis(value) {
  let unit = 0;
  while (value / Math.pow(1024, unit) >= 1024 && unit < 4) unit += 1;
  const one = Math.pow(1024, unit);
  return [one * ceiling(value / one), (amount) => Number((amount / one).toFixed(2)) + " " + UNITS[unit]];
}

function bars(svg, steps, stack, highest, label, line) {
  svg.replaceChildren();
  /* Drawn in pixels of the page, so that text keeps its size on a phone. */
  const box = {width: svg.clientWidth, height: svg.clientHeight};
  svg.setAttribute("viewBox", "0 0 " + box.width + " " + box.height);
  const width = box.width - LEFT - RIGHT, height = box.height - TOP - BOTTOM;
  const y = (value) => TOP + height * (1 - value / highest);
  for (let tick = 0; tick <= 4; tick += 1) {
    const value = highest * tick / 4;
    element("line", {class: "grid", x1: LEFT, x2: LEFT + width, y1: y(value), y2: y(value)}, svg);
    element("text", {x: LEFT - 6, y: y(value) + 4, "text-anchor": "end"}, svg).textContent = label(value);
  }
  const slot = width / steps.length, gap = slot > 4 ? 1 : 0;
  steps.forEach((step, index) => {
    let sum = 0;
    for (const [kind, value] of stack(step)) {
      element("rect", {class: kind, x: LEFT + index * slot, width: Math.max(0.5, slot - gap), y: y(sum + value),
        height: Math.max(0, y(sum) - y(sum + value))}, svg);
      sum += value;
    }
  });
  if (line) {
    let path = "";
    steps.forEach((step, index) => {
      path += (index ? "L" : "M") + (LEFT + index * slot) + " " + y(line(step)) + "h" + slot;
    });
    element("path", {class: "plan", d: path}, svg);
  }
  const last = element("text", {x: LEFT + width, y: box.height - 6, "text-anchor": "end"}, svg);
  last.textContent = "step " + steps.length;
  if (steps.length > 1) element("text", {x: LEFT, y: box.height - 6}, svg).textContent = "step 1";
  svg.onpointermove = (event) => {
    const area = svg.getBoundingClientRect();
    const x = event.clientX - area.left - LEFT;
    tell(event, describe(Math.max(0, Math.min(steps.length - 1, Math.floor(x / slot)))));
  };
  svg.onpointerleave = hide;
}

function describe(index) {
  const step = data.prefills[shown].steps[index], plan = step.step, predicted = step.predicted;
  const end = plan.start + plan.chunk_tokens;
  const lines = ["step " + (index + 1) + ": tokens " + count(plan.start) + " to " + count(end),
    "chunk " + count(plan.chunk_tokens) + ", memory " + count(plan.memory_before) + " to " + count(plan.memory_after),
    "measured  " + bytes(step.peak_bytes), "predicted " + bytes(above(predicted)) + " in phase " + predicted.phase];
  for (const kind of ["memory", "workspace", "activations", "attention", "scoring", "logits"])
    if (predicted[kind]) lines.push("  " + kind + " " + bytes(predicted[kind]));
  lines.push(step.seconds.toFixed(2) + " s");
  return lines.join("\n");
}

function tell(event, text) {
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  const right = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(0, Math.min(event.pageX + 12, right)) + "px";
  tip.style.top = event.pageY + 16 + "px";
}
function hide() { byId("tip").hidden = true; }

/* One cell per layer and step, or what else `across` and `down` are; `values` gives a step's layers, null where there
   is nothing to show. */
function heat(id, steps, values, low, high, label, across = "step", down = "layer") {
  const canvas = byId(id), layers = Math.max(1, ...steps.map((step) => values(step).length));
  canvas.width = steps.length;
  canvas.height = layers;
  const paint = canvas.getContext("2d"), color = getComputedStyle(document.body).getPropertyValue("--heat");
  steps.forEach((step, index) => values(step).forEach((value, layer) => {
    if (value === null) return;
    const share = high > low ? (value - low) / (high - low) : 1;
    paint.fillStyle = "rgba(" + color + "," + (0.08 + 0.92 * share) + ")";
    paint.fillRect(index, layer, 1, 1);
  }));
  canvas.onpointermove = (event) => {
    const area = canvas.getBoundingClientRect();
    const index = Math.floor((event.clientX - area.left) / area.width * steps.length);
    const layer = Math.floor((event.clientY - area.top) / area.height * layers);
    const value = steps[index] ? values(steps[index])[layer] : undefined;
    if (value === undefined || value === null) { hide(); return; }
    tell(event, across + " " + (index + 1) + ", " + down + " " + (layer + 1) + "\n" + label(value));
  };
  canvas.onpointerleave = hide;
}

function heats(steps) {
  const peaks = steps.flatMap((step) => step.layer_peaks);
  const low = peaks.reduce((a, b) => Math.min(a, b), Infinity), high = peaks.reduce((a, b) => Math.max(a, b), 0);
  heat("heat", steps, (step) => step.layer_peaks, low, high, (value) => "peak " + bytes(value));
  const kept = steps.some((step) => step.retention.some((share) => share !== null));
  byId("kept").hidden = byId("retention").hidden = !kept;
  byId("nothing").hidden = kept;
  heat("retention", steps, (step) => step.retention, 0, 1, (value) => "kept " + (100 * value).toFixed(1) + "%");
}

/* What became of the memory, where the reading was probed. */
function probed(name) {
  const probe = data.probes[name], same = (values) => values;
  byId("probe").hidden = !probe;
  if (!probe) return;
  const said = (words) => (share) => (100 * share).toFixed(1) + "% " + words;
  const least = probe.mass_kept.flat().reduce((low, share) => share === null ? low : Math.min(low, share), 1);
  heat("mass", probe.mass_kept, same, least, 1, said("of the attention kept"));
  heat("survival", probe.survival, same, 0, 1, said("of the chunk is there"), "step", "chunk");
  /* By chunk, oldest first; before the first chunk there is nothing in a fresh prompt. */
  const chunks = probe.steps.map((_, chunk) => probe.layer_origins.map((shares) => shares[chunk + 1]));
  const most = chunks.flat().reduce((high, share) => Math.max(high, share), 0);
  heat("origins", chunks, same, 0, most, said("of the layer's memory"), "chunk", "layer");
}

function table(target, head, rows) {
  const fill = (parent, cells, kind) => {
    const row = parent.appendChild(document.createElement("tr"));
    for (const cell of cells) row.appendChild(document.createElement(kind)).textContent = cell;
  };
  target.replaceChildren();
  fill(target, head, "th");
  for (const row of rows) fill(target, row, "td");
}

const tokens = (step) => [["memory", step.step.memory_before], ["chunk", step.step.chunk_tokens]];
const total = (pairs) => pairs.reduce((sum, pair) => sum + pair[1], 0);

function show(index) {
  shown = index;
  const prefill = data.prefills[index], steps = prefill.steps;
  document.querySelectorAll("[role=tab]").forEach((tab, at) => tab.setAttribute("aria-selected", String(at === index)));
  byId("measured").textContent = bytes(prefill.peak_bytes);
  byId("measured").dataset.bytes = prefill.peak_bytes;
  byId("predicted").textContent = bytes(prefill.predicted_bytes);
  byId("difference").textContent = percent(prefill.error);
  byId("speed").textContent = count(prefill.tokens_per_second);
  /* What keeps everything would dwarf the schedules with a bounded memory, which share one scale. */
  const bounded = (name) => name === "imdc" || name === "im" || name === "fm";
  const scale = data.prefills.filter((other) => other === prefill || bounded(other.name) && bounded(prefill.name))
    .flatMap((other) => other.steps);
  const most = scale.reduce((high, step) => Math.max(high, step.peak_bytes, above(step.predicted)), 0);
  const [top, label] = bytesAxis(most);
  bars(byId("bytes"), steps, parts, top, label, (step) => above(step.predicted));
  const widest = scale.reduce((high, step) => Math.max(high, total(tokens(step))), 0);
  bars(byId("tokens"), steps, tokens, ceiling(widest), count, null);
  heats(steps);
  probed(prefill.name);
  table(byId("steps"), ["step", "from", "chunk", "memory before", "after", "measured", "predicted", "seconds"],
    steps.map((step, at) => [at + 1, count(step.step.start), count(step.step.chunk_tokens),
      count(step.step.memory_before), count(step.step.memory_after), bytes(step.peak_bytes),
      bytes(above(step.predicted)), step.seconds.toFixed(2)]));
}

byId("about").textContent = data.family + ", " + data.layers + " layers, " + data.dtype + " on " + data.device
  + "; weights " + bytes(data.weight_bytes);
data.prefills.forEach((prefill, index) => {
  const tab = document.createElement("button");
  tab.setAttribute("role", "tab");
  tab.textContent = prefill.name;
  tab.onclick = () => show(index);
  byId("tabs").append(tab);
});
table(byId("compare"), ["", "steps", "measured", "predicted", "difference", "seconds", "tokens/s"],
  data.prefills.map((prefill) => [prefill.name, count(prefill.steps.length), bytes(prefill.peak_bytes),
    bytes(prefill.predicted_bytes), percent(prefill.error), prefill.seconds.toFixed(2),
    count(prefill.tokens_per_second)]));
const savings = (balance) => data.predicted_savings.filter((entry) => entry.balance === balance)
  .map((entry) => (100 * entry.saving).toFixed(1) + "% at M = " + entry.ratio + "C").join(", ");
if (data.predicted_savings.length)
  byId("saving").textContent = "Predicted saving of imdc over fm with this chunk size: " + savings("tokens") +
    " with tokens levelled; " + savings("bytes") + " with bytes levelled (balance=\"bytes\").";
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(shown));
addEventListener("resize", () => show(shown));
show(0);
