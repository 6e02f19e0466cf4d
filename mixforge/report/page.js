"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const narrow = () => window.innerWidth < 600;
const ARMS = {
  search: { name: "search", symbol: "circle", size: 6, opacity: 0.55 },
  random: { name: "random arm", symbol: "x-thin", size: 7, opacity: 0.7 },
  baseline: { name: "baseline", symbol: "diamond", size: 11, opacity: 1 },
  front: { name: "on the front", symbol: "circle", size: 10, opacity: 1 },
};

function layout(xTitle, yTitle, more) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), family: "system-ui, sans-serif", size: narrow() ? 11 : 13 },
    margin: { l: 50, r: 12, t: 10, b: 44 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: narrow() ? 10 : 12 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("ink") },
    hoverlabel: { align: "left", bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: { ...axis, title: { text: xTitle }, ...(more && more.xaxis) },
    yaxis: { ...axis, title: { text: yTitle }, ...(more && more.yaxis) },
  };
}
const options = { responsive: true, displaylogo: false, displayModeBar: narrow() ? false : undefined, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

function title(name) {
  const figure = data.figures[name];
  const arrow = figure.better === "lower" ? "lower is better" : "higher is better";
  return `${figure.label}, ${figure.unit} (${arrow})`;
}

function scale(name) {
  const values = data.points.map((p) => p.values[name]).filter((v) => v != null);
  const low = Math.min(...values), high = Math.max(...values);
  return low > 0 && high / low > 8 ? { type: "log", dtick: high / low > 50 ? undefined : "D2" } : { type: "linear" };
}

// The points that no other beats in these two figures alone, as a staircase.
function stairs(x, y) {
  const sx = data.figures[x].better === "lower" ? 1 : -1, sy = data.figures[y].better === "lower" ? 1 : -1;
  const pairs = data.points.map((p) => [p.values[x], p.values[y]]).filter((p) => p[0] != null && p[1] != null);
  pairs.sort((a, b) => sx * (a[0] - b[0]) || sy * (a[1] - b[1]));
  const kept = [];
  for (const pair of pairs) {
    if (!kept.length || sy * pair[1] < sy * kept[kept.length - 1][1]) kept.push(pair);
  }
  return kept;
}

// Long architectures are broken at their plus signs, so that a box stays on the screen.
function wrapped(text) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines[lines.length - 1].length + word.length > (narrow() ? 34 : 70)) lines.push("");
    lines[lines.length - 1] += (lines[lines.length - 1] ? " " : "") + word;
  }
  return lines.slice(0, 8).join("<br>") + (lines.length > 8 ? " …" : "");
}

function hover(point) {
  const figures = data.shown.filter((name) => point.text[name]).map((n) => `${data.figures[n].label}: ${point.text[n]}`);
  return `<b>${point.label}</b> trial ${point.number}<br>${wrapped(point.architecture)}<br>${figures.join("<br>")}`;
}

function errors(points, name) {
  if (!points.some((p) => p.spreads[name])) return undefined;
  return { type: "data", array: points.map((p) => (p.spreads[name] || 0) / 2), thickness: 1.2, width: 3 };
}

function drawFront() {
  const x = element("x").value, y = element("y").value;
  const traces = [];
  const line = stairs(x, y);
  traces.push({
    x: line.map((p) => p[0]), y: line.map((p) => p[1]), mode: "lines", hoverinfo: "skip", showlegend: false,
    line: { shape: "hv", color: colour("front"), width: 1.2, dash: "dot" },
  });
  for (const role of ["search", "random", "front", "baseline"]) {
    const points = data.points.filter((p) => p.role === role && p.values[x] != null && p.values[y] != null);
    if (!points.length) continue;
    const style = ARMS[role], strong = role === "front" || role === "baseline";
    traces.push({
      name: style.name,
      mode: role === "baseline" ? "markers+text" : "markers",
      x: points.map((p) => p.values[x]), y: points.map((p) => p.values[y]),
      error_x: strong ? errors(points, x) : undefined, error_y: strong ? errors(points, y) : undefined,
      text: points.map((p) => p.label), customdata: points.map((p) => p.label), textfont: { color: colour("baseline"), size: 11, shadow: "auto" },
      hovertext: points.map(hover), hoverinfo: "text",
      marker: {
        symbol: style.symbol, size: style.size, opacity: style.opacity, color: colour(role),
        // A baseline on the front wears the front's colour as its rim.
        line: { width: points.map((p) => (p.front || role === "random" ? 2 : 0.5)),
                color: points.map((p) => (role === "random" ? colour("random") : p.front ? colour("front") : colour("ground"))) },
      },
    });
  }
  Plotly.react("front", traces, layout(title(x), title(y), { xaxis: scale(x), yaxis: scale(y) }), options).then(nameBaselines);
}

// Marks in one place share a name; each stands on the side of its mark where it covers no other, as in the SVG picture.
// Farther out than a side it is pushed by empty lines.
function nameBaselines() {
  const plot = element("front"), index = plot.data.findIndex((trace) => trace.name === ARMS.baseline.name);
  if (index < 0) return;
  const { xaxis, yaxis } = plot._fullLayout, { x, y, customdata: labels } = plot.data[index];
  const marks = labels.map((_, n) => [xaxis.d2p(x[n]), yaxis.d2p(y[n])]);
  const near = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]) <= 3;
  const texts = labels.map(() => ""), sides = labels.map(() => "top center"), boxes = [];
  const heads = [];
  for (const [n, label] of labels.entries()) {
    let head = heads.find((h) => near(marks[h], marks[n]));
    if (head === undefined) heads.push(head = n);
    texts[head] += (texts[head] ? ", " : "") + label;
  }
  for (const n of heads) {
    const best = sidesOf(marks[n], texts[n].length * 6.6).map((side) => {
      const { box } = side, others = heads.filter((other) => other !== n);
      const outside = box[0] < 0 || box[1] < 0 || box[2] > xaxis._length || box[3] > yaxis._length;
      const covered = boxes.filter((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3]).length;
      const hidden = others.filter((other) => away(box, marks[other]) < 6).length;
      const nearer = others.filter((other) => away(box, marks[other]) < away(box, marks[n])).length;
      return { ...side, cost: 1000 * outside + 100 * covered + 3 * nearer + 2 * hidden + side.ring };
    }).reduce((a, b) => (b.cost < a.cost ? b : a));
    boxes.push(best.box);
    const lines = "<br>\u00a0".repeat(best.ring);
    sides[n] = best.side;
    texts[n] = best.side.startsWith("top") ? texts[n] + lines : "\u00a0<br>".repeat(best.ring) + texts[n];
  }
  Plotly.restyle("front", { text: [texts], textposition: [sides] }, [index]);
}

// Plotly's places for a text of some pixels beside a mark, the best first, with the boxes that it fills there.
function sidesOf([x, y], wide) {
  const lefts = { center: x - wide / 2, right: x + 8, left: x - 8 - wide }, found = [];
  for (let ring = 0; ring < 6; ring++) {
    const tops = { top: y - 22 - 14 * ring, bottom: y + 8 + 14 * ring, ...(ring ? {} : { middle: y - 7 }) };
    for (const up of Object.keys(tops)) for (const across of Object.keys(lefts)) {
      const left = lefts[across], top = tops[up];
      if (up !== "middle" || across !== "center") found.push({ side: `${up} ${across}`, ring, box: [left, top, left + wide, top + 14] });
    }
  }
  return found;
}

function away(box, [x, y]) {
  return Math.hypot(Math.max(box[0] - x, 0, x - box[2]), Math.max(box[1] - y, 0, y - box[3]));
}

function drawGrowth() {
  const traces = data.growth.map((arm) => ({
    x: arm.trials, y: arm.volumes, name: ARMS[arm.arm].name, mode: "lines",
    line: { shape: "hv", width: 2.2, color: colour(arm.arm === "search" ? "front" : "random"), dash: arm.arm === "search" ? "solid" : "dash" },
    hovertemplate: "%{y:.4g} after %{x} trials",
  }));
  if (data.baselineVolume != null) {
    const last = Math.max(...data.growth.map((arm) => arm.trials[arm.trials.length - 1]));
    traces.push({ x: [1, last], y: [data.baselineVolume, data.baselineVolume], name: "baselines alone", mode: "lines",
      line: { width: 1.6, dash: "dot", color: colour("baseline") }, hovertemplate: "%{y:.4g}" });
  }
  Plotly.react("growth", traces, layout("trials of the arm", "hypervolume", { yaxis: { rangemode: "tozero" } }), options);
}

function drawCurves() {
  data.tasks.forEach((task, number) => {
    const curves = data.curves.filter((curve) => curve.task === task);
    const seen = {};
    const traces = curves.map((curve) => {
      const first = !seen[curve.role];
      seen[curve.role] = true;
      return {
        x: curve.steps, y: curve.loss, mode: "lines", name: ARMS[curve.role].name, legendgroup: curve.role,
        showlegend: first, opacity: 0.85,
        line: { width: 1.6, color: colour(curve.role), dash: curve.role === "baseline" ? "dash" : "solid" },
        hovertemplate: `<b>${curve.label}</b><br>step %{x}: %{y:.3f}<extra></extra>`,
      };
    });
    Plotly.react("curve" + number, traces, layout("step", "training loss, nats per token"), options);
  });
}

function draw() { drawFront(); drawGrowth(); drawCurves(); }
for (const id of ["x", "y"]) element(id).addEventListener("change", drawFront);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
// After a zoom or in another window other marks are near.
element("front").on("plotly_relayout", nameBaselines);
