"use strict";
// Draw the charts of figures/charts.py with Observable Plot: hover for values, press a legend entry to hide its series,
// choose the scale of an axis. Without this script the page still shows every number.
const SYMBOLS = ["circle", "square", "triangle", "diamond2", "cross", "star", "wye"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4"];
const TYPES = {linear: "linear", log: "log", root: "sqrt"}; // ours to Plot's
const SUFFIXES = {linear: "", log: ", log scale", root: ", root scale"};
const CHARACTER = 6.6; // px, width of a wide character
const GAP = 16; // px between panels
const colour = (series) => `var(--c${series.style ?? 0})`;
const symbol = (series) => SYMBOLS[series.style ?? 0] ?? "circle";
const dash = (series) => series.dash ?? DASHES[series.style ?? 0] ?? "";

/** A number as short text. */
function short(value) {
  if (value === null) return "";
  return Math.abs(value) >= 1e4 ? d3.format(".3~s")(value) : String(+value.toPrecision(6));
}

/** Text that fits into `width` px, its middle elided if it is longer. */
function elide(text, width) {
  const most = Math.floor(width / CHARACTER);
  return text.length <= most ? text : `${text.slice(0, most / 2 - 1)}…${text.slice(1 - most / 2)}`;
}

/**
 * An axis around finite values and the ends of their intervals; null if none can be shown. note: what is not shown, on y also
 * values too far off, which would squeeze the others into a line.
 */
function axisAround(values, ends, type, isY) {
  const isShown = (v) => Number.isFinite(v) && (type !== "log" || v > 0);
  const known = [...values, ...ends].filter(isShown).sort(d3.ascending);
  if (!known.length) return null;
  const [least, most] = [d3.quantile(known, 0.05), d3.quantile(known, 0.95)];
  const reach = isY && type !== "log" && known.length >= 20 ? 5 * (most - least) || Infinity : Infinity;
  const kept = known.filter((v) => v >= least - reach && v <= most + reach), beyond = known.length - kept.length;
  const below = values.filter((v) => Number.isFinite(v) && !isShown(v)).length;
  let [low, high] = d3.extent(kept);
  if (type === "root" && d3.min(values) >= 0) low = 0;
  if (low === high) {
    const half = Math.abs(low) / 10 || 0.1;
    [low, high] = type === "log" ? [low / 2, high * 2] : [low - half, high + half];
  }
  return {
    type: TYPES[type], domain: [low, high], suffix: SUFFIXES[type], isShown,
    note: below ? ` (${below} at or below 0 not shown)` : beyond ? ` (${beyond} outliers not shown)` : "",
    fits: (v) => isShown(v) && v >= low && v <= high,
    atLeast: (v) => Math.max(v, low), // for the ends of intervals, which may lie below a log or root scale
  };
}

/** The axis of a chart with one row per label. */
function axisOfRows(domain) {
  return {type: "point", domain, suffix: "", note: "", fits: () => true, isShown: () => true, atLeast: (v) => v};
}

/** Ticks at `wanted` or, except on a linear scale, at round values, without those within `gap` px of another. */
function ticks(axis, wanted, length, gap) {
  if (!wanted && axis.type === "linear") return d3.ticks(...axis.domain, Math.max(2, Math.round(length / (gap * 2))));
  const place = Plot.scale({x: {type: axis.type, domain: axis.domain, range: [0, length]}}).apply;
  const round = [1, 5, 2].flatMap((m) => d3.range(12, -10, -1).map((power) => Number(`${m}e${power}`)));
  const kept = [];
  for (const value of wanted ?? [0, ...round]) {
    if (axis.fits(value) && kept.every((other) => Math.abs(place(value) - place(other)) >= gap)) kept.push(value);
  }
  return kept;
}

/** The marks of a series: band, line, bars, small points, markers, names. */
function marksOf(series, points, x, y) {
  const stroke = colour(series), dx = series.shift ?? 0, place = {x: "x", y: "y", dx};
  const shown = points.filter((p) => p.isShown), ranged = (axis) => shown.filter((p) => p[`${axis}_interval`]);
  const bar = {stroke, dx, strokeWidth: 1.6, clip: true, className: "bar"};
  // Small points lie below or beside their mean, in a plane of two metrics where they are.
  const [right, down] = y.type === "point" ? [0, 7] : points.some((p) => p.x_interval) ? [0, 0] : [6, 0];
  const cloud = (series.cloud ?? []).filter(([a, b]) => x.fits(a) && y.fits(b));
  return [
    series.has_band && Plot.areaY(points.filter((p) => p.y_interval),
      {x: "x", y1: "y1", y2: "y2", fill: stroke, fillOpacity: 0.16, clip: true}),
    series.is_line !== false && Plot.line(points, {
      x: (p) => (x.isShown(p.x) ? p.x : NaN), y: (p) => (y.isShown(p.y) ? p.y : NaN), dx, stroke, className: "line",
      strokeWidth: series.style === "x" ? 1.1 : 1.7, strokeDasharray: dash(series), clip: true,
    }),
    !series.has_band && Plot.ruleX(ranged("y"), {...bar, x: "x", y1: "y1", y2: "y2"}),
    !series.has_band && Plot.ruleY(ranged("x"), {...bar, y: "y", x1: "x1", x2: "x2"}),
    Plot.dot(cloud, {x: ([a]) => a, y: ([, b]) => b, r: 2, fill: stroke, fillOpacity: 0.45, dx: dx + right, dy: down}),
    series.has_markers !== false && Plot.dot(shown, {...place, r: 4, symbol: symbol(series), fill: stroke, className: "mark"}),
    Plot.text(shown.filter((p) => p.name), {...place, text: (p) => elide(p.name, 200), fill: stroke, className: "names"}),
  ].filter(Boolean);
}

/** Draw a panel of `width` px without the hidden series; an empty text if nothing is left. types: chosen scales of axes. */
function draw(panel, hidden, types, width) {
  const series = panel.series.filter((s) => !hidden.has(s.label));
  const axisOf = (axis, place, marked) => {
    const values = series.flatMap((s) => [...s.points.map((p) => p[axis]), ...(s.cloud ?? []).map((point) => point[place])]);
    const ends = [...series.flatMap((s) => s.points.flatMap((p) => p[`${axis}_interval`] ?? [])), ...marked];
    const type = types[axis] || panel[axis] || "linear";
    return axisAround(values, ends, type, axis === "y") ?? axisAround(values, ends, "linear", axis === "y");
  };
  const rowsOf = (shown) => new Set(shown.flatMap((s) => s.points.map((p) => p.y)));
  const [measured, left] = [rowsOf(panel.series), rowsOf(series)];
  const rows = panel.rows?.filter((row) => left.has(row) || !measured.has(row));
  const x = axisOf("x", 0, [...(panel.lines ?? []), ...(panel.dashed ?? [])]), y = rows ? axisOfRows(rows) : axisOf("y", 1, []);
  if (!x || !y || !series.length) return "";
  const drawn = series.map((s) => [s, s.points.map((p) => ({
    ...p, isShown: x.fits(p.x) && y.fits(p.y),
    tip: p.tip ?? `${s.arm ?? s.label}\n${panel.xlabel} ${short(p.x)}: ${short(p.y)}`,
    x1: x.atLeast(p.x_interval?.[0]), x2: p.x_interval?.[1], y1: y.atLeast(p.y_interval?.[0]), y2: p.y_interval?.[1],
  }))]);
  const labels = rows ? Math.min(176, CHARACTER * Math.max(...rows.map((row) => row.length))) : 38;
  const [marginTop, marginBottom, marginLeft, marginRight] = [panel.title ? 28 : 6, panel.xlabel ? 42 : 24, 14 + labels, 14];
  const inner = width - marginLeft - marginRight;
  const xTicks = ticks(x, panel.ticks, inner - 36, 40), yTicks = rows ?? ticks(y, null, 200, 22);
  const isNamed = panel.series.some((s) => s.points.some((p) => p.name));
  const svg = Plot.plot({
    width, height: rows ? marginTop + marginBottom + 24 * rows.length : isNamed ? 340 : 290,
    marginTop, marginBottom, marginLeft, marginRight, inset: rows ? 0 : 10, insetLeft: 18, insetRight: 18,
    className: "chart", ariaLabel: panel.title || drawn[0][1][0].tip,
    x: {type: x.type, domain: x.domain}, y: {type: y.type, domain: y.domain, padding: 0.5},
    marks: [
      Plot.gridX(xTicks), Plot.axisX(xTicks, {
        text: short, tickSize: 0, label: panel.xlabel && elide(panel.xlabel + x.suffix + x.note, inner), labelAnchor: "center",
        labelArrow: "none", labelOffset: 36,
      }),
      !rows && Plot.gridY(yTicks),
      Plot.axisY(yTicks, {text: rows ? (row) => elide(row, labels) : short, tickSize: 0, label: null}),
      labels && Plot.frame({anchor: "left", strokeOpacity: 0.6}),
      Plot.frame({anchor: "bottom", strokeOpacity: 0.6}),
      Plot.ruleX(panel.lines ?? [], {stroke: "currentColor", className: "level"}),
      Plot.ruleX(panel.dashed ?? [], {stroke: "var(--dim)", strokeDasharray: "4 3", className: "level"}),
      ...drawn.flatMap(([s, points]) => marksOf(s, points, x, y)),
      rows && Plot.text(rows.filter((row) => !measured.has(row)),
        {y: (row) => row, text: () => "not measured", frameAnchor: "left", dx: 6, fill: "var(--dim)"}),
      panel.title && Plot.text([elide(panel.title + y.suffix + y.note, width)], {frameAnchor: "top", dy: -20, fontWeight: 600}),
      Plot.tip(drawn.flatMap(([, points]) => points.filter((p) => p.isShown)),
        Plot.pointer({x: "x", y: "y", title: "tip", fill: "var(--page)", stroke: "var(--dim)", lineWidth: 22})),
    ].filter(Boolean),
  });
  svg.setAttribute("role", "img");
  return svg;
}

/** Move each name beside its point to where it covers nothing else; remove those that fit nowhere. */
function separate(svg) {
  const frame = svg.getBoundingClientRect(), names = svg.querySelectorAll(".names text");
  const taken = [...svg.querySelectorAll(".mark > *, .bar > *")].map((e) => e.getBoundingClientRect());
  const spots = [[7, -7, "start"], [7, 9, "start"], [-7, -7, "end"], [-7, 9, "end"], [0, -12, "middle"], [0, 14, "middle"],
    [14, -16, "start"], [-14, -16, "end"], [14, 20, "start"], [-14, 20, "end"]];
  for (const path of names.length ? svg.querySelectorAll(".line path") : []) {
    for (let length = 0; length < path.getTotalLength(); length += 6) {
      const {x, y} = path.getPointAtLength(length).matrixTransform(path.getScreenCTM());
      taken.push(new DOMRect(x - 1, y - 1, 2, 2));
    }
  }
  for (const name of names) {
    const isPlaced = spots.some(([right, down, anchor]) => {
      for (const [key, value] of [["x", right], ["y", down], ["text-anchor", anchor]]) name.setAttribute(key, value);
      const box = name.getBoundingClientRect();
      const isInside = box.left > frame.left + 52 && box.right < frame.right - 4 // within the axes
        && box.top > frame.top + 24 && box.bottom < frame.bottom - 42;
      const covers = (b) => box.left - 5 < b.right && b.left < box.right + 5 && box.top < b.bottom && b.top < box.bottom;
      if (!isInside || taken.some(covers)) return false;
      taken.push(box);
      return true;
    });
    if (!isPlaced) name.remove();
  }
}

/** The drawing that a legend shows before a label. */
function swatch(entry) {
  const points = [0, 1, 2].map((x) => ({x, y: 0})), place = {x: "x", y: "y"}, stroke = colour(entry);
  const svg = Plot.plot({
    width: 32, height: 14, margin: 7, axis: null, x: {domain: [0, 2], range: [0, 32]}, y: {domain: [-1, 1]}, className: "chart",
    marks: [
      entry.is_line !== false && Plot.line(points, {...place, stroke, strokeWidth: 1.7, strokeDasharray: dash(entry)}),
      entry.has_markers !== false && Plot.dot(points.slice(1, 2), {...place, r: 4, fill: stroke, symbol: symbol(entry)}),
    ].filter(Boolean),
  });
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

/** A choice of the scale of one axis. */
function choice(axis, types, redraw) {
  const label = document.createElement("label"), select = document.createElement("select");
  const choices = {"": "default", linear: "linear", log: "log", root: "square root"};
  for (const [value, text] of Object.entries(choices)) select.add(new Option(text, value));
  select.addEventListener("change", () => {
    types[axis] = select.value;
    redraw();
  });
  label.append(`${axis} axis `, select);
  return label;
}

for (const figure of document.querySelectorAll("figure")) {
  const {panels, legend} = JSON.parse(figure.querySelector("script").textContent);
  const place = figure.querySelector(".panels"), hidden = new Set(), types = {};
  const redraw = () => {
    const room = Math.max(280, place.clientWidth), most = Math.floor((room + GAP) / 352) || 1; // panels in a row
    const across = Math.ceil(panels.length / Math.ceil(panels.length / most)); // 4 are 2 and 2 rather than 3 and 1
    const width = Math.min(panels.length > 1 ? 600 : 720, Math.floor((room - GAP * (across - 1)) / across));
    place.replaceChildren(...panels.map((panel) => draw(panel, hidden, types, width)));
    place.querySelectorAll("svg.chart").forEach(separate);
  };
  const items = figure.querySelectorAll(".legend li");
  legend.forEach((entry, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "show or hide";
    button.setAttribute("aria-pressed", "true");
    button.append(swatch(entry), ...items[i].childNodes);
    button.addEventListener("click", () => {
      if (!hidden.delete(entry.label)) hidden.add(entry.label);
      button.setAttribute("aria-pressed", String(!hidden.has(entry.label)));
      redraw();
    });
    items[i].append(button);
  });
  const axes = panels.some((panel) => !panel.rows) ? ["x", "y"] : ["x"];
  figure.querySelector(".values")?.removeAttribute("open");
  figure.querySelector(".controls")?.append(...axes.map((axis) => choice(axis, types, redraw)));
  redraw();
}
