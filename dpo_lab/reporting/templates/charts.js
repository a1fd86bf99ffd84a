"use strict";
// Draw the charts of figures/charts.py with Observable Plot: hover for values, press a legend entry to hide its series,
// choose the scale of an axis. Without this script the page still shows every number.
const SYMBOLS = ["circle", "square", "triangle", "diamond2", "cross", "star", "wye"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4"];
const SCALES = {linear: "linear", log: "log", root: "sqrt"}; // ours to Plot's
const ASPECTS = {linear: "", log: ", log scale", root: ", root scale"};
const CHARACTER = 6.6; // px, width of a wide character
const colour = (series) => `var(--c${series.style ?? 0})`;
const dash = (series) => series.dash ?? DASHES[series.style ?? 0] ?? "";
const elide = (text, most) => (text.length <= most ? text : `${text.slice(0, most / 2 - 1)}…${text.slice(1 - most / 2)}`);
const short = (value) => (value === null ? "" : Math.abs(value) >= 1e4 ? d3.format(".3~s")(value) : String(+value.toPrecision(6)));

/** The limits of an axis around finite values, and how many are too far off: those would squeeze the rest into a line. */
function limits(values, type) {
  const known = values.filter((v) => Number.isFinite(v) && (type !== "log" || v > 0)).sort(d3.ascending);
  if (!known.length) return null;
  const reach = type === "linear" && known.length >= 20 ? 5 * (d3.quantile(known, 0.95) - d3.quantile(known, 0.05)) : 0;
  const kept = reach ? known.filter((v) => Math.abs(v - d3.median(known)) <= reach) : known;
  let [low, high] = d3.extent(kept);
  if (type === "root") low = 0;
  if (low === high) [low, high] = type === "log" ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  return {domain: [low, high], beyond: known.length - kept.length, type: SCALES[type], low: (v) => Math.max(v, low)};
}

/** Ticks at `wanted` values or, except on a linear scale, at round ones, without those that lie too close to another. */
function ticks(axis, wanted, length, gap) {
  if (!wanted && axis.type === "linear") return Math.max(2, Math.round(length / (gap * 2)));
  const place = Plot.scale({x: {type: axis.type, domain: axis.domain, range: [0, length]}}).apply;
  const round = [1, 5, 2].flatMap((m) => d3.range(12, -10, -1).map((power) => Number(`${m}e${power}`)));
  const kept = [];
  for (const value of wanted ?? (axis.domain[0] > 0 ? round : [0, ...round])) {
    const inside = value >= axis.domain[0] && value <= axis.domain[1];
    if (inside && kept.every((other) => Math.abs(place(value) - place(other)) >= gap)) kept.push(value);
  }
  return kept;
}

/** The marks of one series: band, line, bars, small points, markers. Series of a row chart have text on y. */
function marks(series, x, y) {
  const points = series.points.map((p) => ({
    ...p, shown: x.fits(p.x) && y.fits(p.y), tip: p.tip ?? `${series.arm ?? series.label}\n${x.label} ${short(p.x)}: ${short(p.y)}`,
    x1: x.low(p.x_interval?.[0]), x2: p.x_interval?.[1], y1: y.low(p.y_interval?.[0]), y2: p.y_interval?.[1],
  }));
  const shown = points.filter((p) => p.shown);
  const place = {x: "x", y: "y", dx: series.shift ?? 0}, stroke = colour(series), bar = {...place, stroke, strokeWidth: 1.6, clip: true, className: "bar"};
  const isBar = (p) => !series.has_band && p.shown;
  series.shown = shown;
  return [
    series.has_band && Plot.areaY(points.filter((p) => p.y_interval), {x: "x", y1: "y1", y2: "y2", fill: stroke, fillOpacity: 0.16, clip: true}),
    series.is_line !== false && Plot.line(points, {...place, x: (p) => (x.defined(p.x) ? p.x : NaN), y: (p) => (y.defined(p.y) ? p.y : NaN),
      stroke, strokeWidth: series.style === "x" ? 1.1 : 1.7, strokeDasharray: dash(series), clip: true, className: "line"}),
    Plot.ruleX(points.filter((p) => p.y_interval && isBar(p)), {...bar, y: null, y1: "y1", y2: "y2"}),
    Plot.ruleY(points.filter((p) => p.x_interval && isBar(p)), {...bar, x: null, x1: "x1", x2: "x2"}),
    Plot.dot((series.cloud ?? []).filter(([a, b]) => x.fits(a) && y.fits(b)), {x: ([a]) => a, y: ([, b]) => b, r: 2, fill: stroke, fillOpacity: 0.45,
      dx: place.dx + (y.type ? 6 : 0), dy: y.type ? 0 : 7}),
    series.has_markers !== false && Plot.dot(shown, {...place, r: 4, symbol: SYMBOLS[series.style ?? 0] ?? "circle", fill: stroke, className: "mark"}),
    Plot.text(shown.filter((p) => p.name), {...place, text: (p) => elide(p.name, 30), fill: stroke, className: "names"}),
  ].filter(Boolean);
}

/** Draw a panel of `width` px without the hidden series; an empty text if nothing is left to draw. */
function draw(panel, hidden, chosen, width) {
  const series = panel.series.filter((s) => !hidden.has(s.label));
  const values = (axis) => series.flatMap((s) => [
    ...s.points.flatMap((p) => [p[axis], ...(p[`${axis}_interval`] ?? [])]), ...(s.cloud ?? []).map((point) => point[axis === "x" ? 0 : 1]),
  ]);
  const types = {x: chosen.x || (panel.x ?? "linear"), y: chosen.y || (panel.y ?? "linear")};
  const x = limits([...values("x"), ...(panel.lines ?? []), ...(panel.dashed ?? [])], types.x);
  const measured = new Set(series.flatMap((s) => s.points.map((p) => p.y)));
  const all = new Set(panel.series.flatMap((s) => s.points.map((p) => p.y)));
  const rows = panel.rows?.filter((row) => measured.has(row) || !all.has(row));
  const y = rows ? {domain: rows, low: (v) => v, fits: () => true} : limits(values("y"), types.y);
  if (!x || !y) return "";
  for (const axis of rows ? [x] : [x, y]) {
    axis.defined = (v) => Number.isFinite(v) && (axis.type !== "log" || v > 0);
    axis.fits = (v) => axis.defined(v) && v >= axis.domain[0] && v <= axis.domain[1];
  }
  x.label = panel.xlabel;
  const longest = rows ? Math.max(...rows.map((row) => row.length)) : 0;
  const margins = {marginTop: panel.title ? 28 : 6, marginBottom: panel.xlabel ? 42 : 24, marginRight: 14,
    marginLeft: rows ? (longest ? Math.min(14 + CHARACTER * longest, 190) : 14) : 52};
  const inner = width - margins.marginLeft - margins.marginRight;
  const title = panel.title && `${panel.title}${rows ? "" : ASPECTS[types.y]}${y.beyond ? ` (${y.beyond} outliers not shown)` : ""}`;
  const drawn = series.flatMap((s) => marks(s, x, y)), shown = series.flatMap((s) => s.shown);
  const svg = Plot.plot({
    width, height: rows ? margins.marginTop + margins.marginBottom + 24 * rows.length : panel.series.some((s) => s.points.some((p) => p.name)) ? 340 : 290,
    ...margins, inset: rows ? 0 : 10, insetLeft: 18, insetRight: 18, className: "chart", ariaLabel: panel.title || shown[0]?.tip,
    x: {type: x.type, domain: x.domain, label: panel.xlabel && elide(panel.xlabel + ASPECTS[types.x], Math.floor(inner / CHARACTER)), labelAnchor: "center",
      labelArrow: "none", labelOffset: 36, grid: true, ticks: ticks(x, panel.ticks, inner - 36, 32), tickFormat: short, tickSize: 0},
    y: rows ? {type: "point", domain: rows, label: null, padding: 0.5, tickSize: 0, tickFormat: (row) => elide(row, Math.floor((margins.marginLeft - 14) / CHARACTER))}
      : {type: y.type, domain: y.domain, label: null, grid: true, ticks: ticks(y, null, 200, 22), tickFormat: short, tickSize: 0},
    marks: [
      (!rows || longest) && Plot.frame({anchor: "left", strokeOpacity: 0.6}), Plot.frame({anchor: "bottom", strokeOpacity: 0.6}),
      Plot.ruleX(panel.lines ?? [], {stroke: "currentColor", className: "level"}),
      Plot.ruleX(panel.dashed ?? [], {stroke: "var(--dim)", strokeDasharray: "4 3", className: "level"}),
      ...drawn,
      rows && Plot.text(rows.filter((row) => !all.has(row)), {y: (row) => row, text: () => "not measured", frameAnchor: "left", dx: 6, fill: "var(--dim)"}),
      title && Plot.text([elide(title, Math.floor(width / CHARACTER))], {frameAnchor: "top", dy: -20, fontWeight: 600}),
      Plot.tip(shown, Plot.pointer({x: "x", y: "y", title: "tip", fill: "var(--page)", stroke: "var(--dim)", textPadding: 7, lineWidth: 22})),
    ].filter(Boolean),
  });
  svg.setAttribute("role", "img");
  return svg;
}

/** Move each name beside its point to where it covers nothing else; remove those that fit nowhere. */
function separate(svg) {
  const frame = svg.getBoundingClientRect(), boxes = (selector) => [...svg.querySelectorAll(selector)].map((e) => e.getBoundingClientRect());
  const taken = boxes(".mark > *, .bar > *, [aria-label$='tick label'] text");
  const spots = [[7, -7, "start"], [7, 9, "start"], [-7, -7, "end"], [-7, 9, "end"], [0, -12, "middle"], [0, 14, "middle"],
    [14, -16, "start"], [-14, -16, "end"], [14, 20, "start"], [-14, 20, "end"]];
  for (const name of svg.querySelectorAll(".names text")) {
    const fits = spots.some(([right, down, anchor]) => {
      name.setAttribute("text-anchor", anchor);
      name.setAttribute("x", right);
      name.setAttribute("y", down);
      const box = name.getBoundingClientRect();
      const inside = box.left > frame.left && box.right < frame.right - 4 && box.top > frame.top + 24 && box.bottom < frame.bottom - 40;
      const free = inside && !taken.some((b) => box.left - 5 < b.right && b.left < box.right + 5 && box.top < b.bottom && b.top < box.bottom);
      if (free) taken.push(box);
      return free;
    });
    if (!fits) name.remove();
  }
}

/** The drawing that a legend shows before a label. */
function swatch(entry) {
  const points = [0, 1, 2].map((x) => ({x, y: 0})), stroke = colour(entry);
  const svg = Plot.plot({width: 32, height: 14, margin: 7, axis: null, x: {domain: [0, 2], range: [0, 32]}, className: "chart", marks: [
    entry.is_line !== false && Plot.line(points, {x: "x", y: "y", stroke, strokeWidth: 1.7, strokeDasharray: dash(entry)}),
    entry.has_markers !== false && Plot.dot(points.slice(1, 2), {x: "x", y: "y", r: 4, fill: stroke, symbol: SYMBOLS[entry.style ?? 0] ?? "circle"}),
  ].filter(Boolean)});
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

/** A choice of the scale of one axis of a figure. */
function choice(axis, chosen, redraw) {
  const label = document.createElement("label"), select = document.createElement("select");
  for (const [value, text] of [["", "default"], ["linear", "linear"], ["log", "log"], ["root", "square root"]]) select.add(new Option(text, value));
  select.addEventListener("change", () => {
    chosen[axis] = select.value;
    redraw();
  });
  label.append(`${axis} axis `, select);
  return label;
}

for (const figure of document.querySelectorAll("figure")) {
  const data = JSON.parse(figure.querySelector("script").textContent), panels = figure.querySelector(".panels");
  const hidden = new Set(), chosen = {};
  const redraw = () => {
    const room = Math.max(280, panels.clientWidth), across = Math.max(1, Math.min(data.panels.length, Math.floor((room + 16) / 352)));
    const width = Math.min(560, Math.floor((room - 16 * (across - 1)) / across));
    panels.replaceChildren(...data.panels.map((panel) => draw(panel, hidden, chosen, width)));
    panels.querySelectorAll("svg.chart").forEach(separate);
  };
  const entries = figure.querySelectorAll(".legend li");
  data.legend.forEach((entry, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.title = "show or hide";
    button.append(swatch(entry), ...entries[i].childNodes);
    entries[i].append(button);
    button.addEventListener("click", () => {
      if (!hidden.delete(entry.label)) hidden.add(entry.label);
      button.setAttribute("aria-pressed", String(!hidden.has(entry.label)));
      redraw();
    });
  });
  const controls = figure.querySelector(".controls");
  if (controls) controls.append(choice("x", chosen, redraw), ...(data.panels.some((p) => !p.rows) ? [choice("y", chosen, redraw)] : []));
  redraw();
}
