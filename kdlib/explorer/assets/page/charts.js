// Histograms that filter, the curve of an image, counts of classes, and the table of results.
const BINS = 40;

class Histogram {
  // `brushed(low, high)` is called with the ends of a new range, with nothing for all.
  constructor(parent, score, values, brushed) {
    Object.assign(this, { score, brushed });
    const { low, high, name, meaning } = score;
    this.bins = new Uint8Array(values.length);
    const scale = BINS / (high - low || 1);
    for (let i = 0; i < values.length; i++) {
      const v = values[i];
      this.bins[i] = Number.isNaN(v) ? 255 : Math.min(BINS - 1, Math.floor((v - low) * scale));
    }
    this.svg = el("svg", { viewBox: "0 0 200 60", preserveAspectRatio: "none", role: "img" });
    this.svg.setAttribute("aria-label", `histogram of ${name}`);
    this.bars = el("g");
    this.brush = el("rect", { class: "brush", y: 0, height: 60, width: 0 });
    this.svg.append(this.bars, this.brush);
    this.inputs = ["from", "to"].map((end, k) => {
      const input = el("input", { type: "number", step: "any", "aria-label": `${name} ${end}` });
      input.placeholder = short([low, high][k]);
      input.addEventListener("change", () => this.typed());
      return input;
    });
    parent.append(
      el("div", { class: "histogram", title: meaning }, el("div", { class: "name" }, name), this.svg,
        el("div", { class: "ends" }, ...this.inputs))
    );
    this.listen();
  }

  typed() {
    const { low, high } = this.score;
    const [from, to] = this.inputs.map((input) => (input.value === "" ? null : +input.value));
    if (from === null && to === null) this.range();
    else this.range(from === null ? low : from, to === null ? high : to);
  }

  // Filter by a range; without ends, keep all.
  range(from, to) {
    this.mark(from, to);
    this.brushed(from, to);
  }

  // Show a range.
  mark(from, to) {
    const { low, high } = this.score;
    const whole = from === undefined;
    const x = (v) => (200 * (v - low)) / (high - low || 1);
    this.brush.setAttribute("x", whole ? 0 : x(from));
    this.brush.setAttribute("width", whole ? 0 : Math.max(0, x(to) - x(from)));
    this.inputs[0].value = whole ? "" : Number(from.toPrecision(4));
    this.inputs[1].value = whole ? "" : Number(to.toPrecision(4));
  }

  listen() {
    let start = null;
    const value = (event) => {
      const box = this.svg.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      return this.score.low + share * (this.score.high - this.score.low);
    };
    this.svg.addEventListener("pointerdown", (event) => {
      this.svg.setPointerCapture(event.pointerId);
      start = [value(event), event.clientX];
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (!start) return;
      const [from, x] = start;
      start = null;
      if (Math.abs(event.clientX - x) < 4) this.range();
      else this.range(Math.min(from, value(event)), Math.max(from, value(event)));
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (!start) return;
      const [a, b] = [start[0], value(event)].sort((p, q) => p - q);
      const x = (v) => (200 * (v - this.score.low)) / (this.score.high - this.score.low || 1);
      this.brush.setAttribute("x", x(a));
      this.brush.setAttribute("width", x(b) - x(a));
    });
  }

  // keeps(i): whether the other filters keep it; chosen: (n,) 1 where selected
  update(mask, bit, chosen) {
    const [all, lit] = [new Float64Array(BINS), new Float64Array(BINS)];
    for (let i = 0; i < this.bins.length; i++) {
      if (mask[i] & ~bit || this.bins[i] === 255) continue;
      all[this.bins[i]] += 1;
      if (chosen[i]) lit[this.bins[i]] += 1;
    }
    const most = Math.max(1, ...all);
    const rects = [];
    for (let b = 0; b < BINS; b++) {
      for (const [n, kind] of [[all[b], "bar"], [lit[b], "lit"]]) {
        if (!n) continue;
        const height = Math.max(1, (58 * n) / most);
        rects.push(el("rect", { class: kind, x: b * 5 + 0.4, width: 4.2, y: 60 - height, height }));
      }
    }
    this.bars.replaceChildren(...rects);
  }
}

// p(label) over the epochs, and below it the predicted class of each: quiet where it was right.
function curve(data, row) {
  const { epochs, classes } = data.header;
  const x = (e) => 34 + (255 * e) / Math.max(1, epochs.length - 1);
  const y = (p) => 10 + 80 * (1 - p / 255);
  const svg = el("svg", { viewBox: "0 0 300 150", role: "img" });
  const values = epochs.map((_, e) => data.gold[e * data.n + row]);
  const last = Math.round((100 * values[values.length - 1]) / 255);
  svg.setAttribute("aria-label", `probability of ${className(data, row)} in each epoch, at last ${last} %`);
  for (const p of [0, 0.5, 1]) {
    svg.append(
      el("line", { class: "rule", x1: 34, x2: 289, y1: y(255 * p), y2: y(255 * p) }),
      el("text", { x: 28, y: y(255 * p) + 4, "text-anchor": "end" }, String(p))
    );
  }
  svg.append(
    el("path", { class: "curve", d: "M" + values.map((v, e) => `${x(e)} ${y(v)}`).join("L") }),
    el("text", { x: 34, y: 148 }, `epoch ${epochs[0]}`),
    el("text", { x: 289, y: 148, "text-anchor": "end" }, String(epochs[epochs.length - 1]))
  );
  if (data.predicted) {
    const width = 255 / epochs.length;
    epochs.forEach((epoch, e) => {
      const taken = data.predicted[e * data.n + row];
      const right = taken === data.labels[row];
      const bar = el("rect", { class: right ? "right" : "wrong", x: 34 + e * width, y: right ? 112 : 104,
        width: Math.max(0.8, width - 0.8), height: right ? 10 : 18 });
      bar.append(el("title", {}, `epoch ${epoch}: ${classes[taken]}`));
      svg.append(bar);
    });
    svg.append(el("text", { x: 34, y: 134 }, "predicted: low grey right, tall colour wrong"));
  }
  return svg;
}

function countsTable(data, chosen, n) {
  const { classes } = data.header;
  const [some, all] = [new Float64Array(classes.length), new Float64Array(classes.length)];
  for (let i = 0; i < data.n; i++) {
    all[data.labels[i]] += 1;
    if (chosen[i]) some[data.labels[i]] += 1;
  }
  if (!n) return [];
  const order = classes.map((_, k) => k).filter((k) => some[k]);
  order.sort((a, b) => some[b] - some[a] || a - b);
  const table = el("table", { class: "counts" });
  for (const k of order.slice(0, 20)) {
    const bar = el("rect", { class: "lit", width: (100 * some[k]) / all[k], height: 10 });
    table.append(
      el("tr", {}, el("td", {}, classes[k]),
        el("td", {}, el("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none" }, bar)),
        el("td", {}, `${count(some[k])} of ${count(all[k])}`))
    );
  }
  return order.length > 20
    ? [table, el("p", { class: "hint" }, `The 20 most of ${order.length} classes.`)]
    : [table];
}

const SIGNED = (share) => {
  const points = Math.round(1000 * share) / 10;
  return points === 0 ? "0.0" : `${points > 0 ? "+" : "\u2212"}${Math.abs(points).toFixed(1)}`;
};

function showResults(results) {
  $("results").hidden = false;
  const about = [el("p", {}, `${results.title}. ${results.about}`)];
  if (results.without.length) {
    about.push(
      el("p", {}, "Without them: students of subsets that hold almost none of the hard-to-learn images, at most " +
        "a tenth as many as a random subset of the same size (set off in the table). These subsets " +
        "differ from random ones in other images, too; the difference is that of the whole choice."),
      el("ul", {}, ...results.without.map((line) => el("li", {}, line)))
    );
  }
  $("results-text").append(...about);
  const several = new Set(results.rows.map((row) => row.student)).size > 1;
  const ends = results.rows.flatMap(({ low, high, difference: d }) => [low ?? d, high ?? d, 0]);
  const [least, most] = [Math.min(...ends), Math.max(...ends)];
  const x = (v) => 5 + (180 * (v - least)) / (most - least || 1);
  const head = [...(several ? ["student"] : []), "strategy", "images", "objective",
    `hard-to-learn, of ${count(results.n_hard)}`, "accuracy (%)", "against", "difference (points)",
    "verdict", ""];
  $("results-table").append(el("tr", {}, ...head.map((text) => el("th", {}, text))));
  for (const row of results.rows) {
    const bar = el("svg", { viewBox: "0 0 190 18", "aria-hidden": "true" });
    bar.append(el("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: 18 }));
    if (row.low !== null) bar.append(el("line", { x1: x(row.low), x2: x(row.high), y1: 9, y2: 9 }));
    if (row.difference !== null) bar.append(el("circle", { class: "dot", cx: x(row.difference), cy: 9, r: 4 }));
    const interval = row.low === null ? "" : ` (${SIGNED(row.low)} to ${SIGNED(row.high)})`;
    $("results-table").append(
      el("tr", { class: row.few ? "few" : null },
        ...(several ? [el("td", {}, row.student)] : []),
        el("td", {}, row.strategy), el("td", {}, row.share), el("td", {}, row.objective),
        el("td", { class: "number" }, row.hard === null ? "-" : count(row.hard)),
        el("td", { class: "number" }, row.mean === null ? "-" : (100 * row.mean).toFixed(1)),
        el("td", {}, row.against),
        el("td", { class: "number" }, (row.difference === null ? "-" : SIGNED(row.difference)) + interval),
        el("td", { class: row.verdict }, row.verdict), el("td", {}, bar))
    );
  }
}
