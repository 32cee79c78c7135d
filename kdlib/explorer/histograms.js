// Histograms of scores with a range each, and a toggle for each class. The kernel counts; this
// draws the counts, and sends ranges (in bins) and chosen classes back.

const SVG = "http://www.w3.org/2000/svg";
const LAYERS = { whole: 0, passing: 0, selected: 0.25 }; // name -> margin of a bar, of its width
const HEIGHT = 100; // of a drawing, in its own units

function add(parent, tag, className, attributes = {}) {
  const node = tag === "path" || tag === "svg" || tag === "rect"
    ? document.createElementNS(SVG, tag)
    : document.createElement(tag);
  if (className) node.setAttribute("class", className);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return parent.appendChild(node);
}

const short = (x) => String(Number(x.toPrecision(3)));
const whole = (n) => n.toLocaleString("en-US");

// Bars whose height is the square root of their count, so that a few among many can be seen.
function bars(counts, most, margin) {
  let path = "";
  for (let i = 0; i < counts.length; i++) {
    if (!counts[i]) continue;
    const height = Math.max(2, HEIGHT * Math.sqrt(counts[i] / most));
    path += `M${i + margin} ${HEIGHT}V${HEIGHT - height}H${i + 1 - margin}V${HEIGHT}Z`;
  }
  return path;
}

class Panel {
  constructor(parent, model, score) {
    Object.assign(this, { model, score, bins: model.get("bins")[score] });
    this.n = this.bins.whole.length;
    this.most = Math.max(1, ...this.bins.whole);
    this.node = add(parent, "div", "kdlib-panel", { role: "group", "aria-label": score });
    const head = add(this.node, "div", "kdlib-panel-head");
    add(head, "b").textContent = score;
    this.clear = add(head, "button", "kdlib-small", {
      title: `Show the whole range of ${score}`, "aria-label": `Show the whole range of ${score}`,
    });
    this.clear.textContent = "all";
    this.clear.onclick = () => this.send(null);
    const close = add(head, "button", "kdlib-small", {
      title: `Close this histogram`, "aria-label": `Close the histogram of ${score}`,
    });
    close.textContent = "×";
    close.onclick = () => this.close();
    this.plot = add(this.node, "div", "kdlib-plot", { "data-score": score });
    const svg = add(this.plot, "svg", "", {
      viewBox: `0 0 ${this.n} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true",
    });
    this.layers = Object.fromEntries(
      Object.keys(LAYERS).map((name) => [name, add(svg, "path", `kdlib-${name}`)]),
    );
    this.layers.whole.setAttribute("d", bars(this.bins.whole, this.most, LAYERS.whole));
    this.shades = [0, 1].map(() => add(svg, "rect", "kdlib-shade", { y: 0, height: HEIGHT }));
    this.handles = ["lowest", "highest"].map((which, end) => this.handle(which, end));
    const ends = add(this.node, "div", "kdlib-ends");
    const [low, high] = this.values([0, this.n]);
    add(ends, "span").textContent = low;
    this.said = add(ends, "span", "kdlib-panel-range");
    add(ends, "span").textContent = high;
    this.plot.addEventListener("pointerdown", (event) => this.drag(event));
    this.plot.addEventListener("pointermove", (event) => this.tell(event));
    this.update();
    this.brush();
  }

  handle(which, end) {
    const node = add(this.plot, "div", "kdlib-handle", {
      role: "slider", tabindex: 0, "aria-label": `${which} ${this.score} that is shown`,
      title: "Arrow keys move it, Delete shows the whole range",
    });
    node.addEventListener("keydown", (event) => {
      const far = event.key.startsWith("Page") ? 5 : 1;
      const by = { ArrowLeft: -1, ArrowDown: -1, PageDown: -1, ArrowRight: 1, ArrowUp: 1,
        PageUp: 1 }[event.key];
      const range = [...this.range()];
      if (by) range[end] += by * far;
      else if (event.key === "Home") range[end] = 0;
      else if (event.key === "End") range[end] = this.n;
      else if (!["Delete", "Backspace"].includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation(); // JupyterLab would move to another cell
      if (["Delete", "Backspace"].includes(event.key)) return this.send(null);
      range[end] = end === 0
        ? Math.max(0, Math.min(range[0], range[1] - 1))
        : Math.min(this.n, Math.max(range[1], range[0] + 1));
      this.send(range);
    });
    return node;
  }

  // The lowest and the highest value in bins [first, last), in words.
  values([first, last]) {
    const { edges, centres } = this.bins;
    return (centres ? [centres[first], centres[last - 1]] : [edges[first], edges[last]]).map(short);
  }

  range() {
    return this.model.get("ranges")[this.score] ?? [0, this.n];
  }

  send(range, dragging = false) {
    const { [this.score]: _, ...ranges } = this.model.get("ranges");
    if (range && (range[0] > 0 || range[1] < this.n)) ranges[this.score] = range;
    this.model.set("ranges", ranges);
    this.model.set("dragging", dragging);
    this.model.save_changes();
  }

  close() {
    this.send(null);
    this.model.set("shown", this.model.get("shown").filter((score) => score !== this.score));
    this.model.save_changes();
  }

  bin(event, round) {
    const box = this.plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.n;
    return Math.max(0, Math.min(round === Math.floor ? this.n - 1 : this.n, round(at)));
  }

  // A handle moves one end, the inside of a range moves both, outside of it a new range begins.
  drag(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.plot.setPointerCapture(event.pointerId);
    const start = this.range();
    const end = this.handles.indexOf(event.target);
    const from = this.bin(event, Math.floor);
    const set = this.score in this.model.get("ranges");
    const inside = set && end < 0 && from >= start[0] && from < start[1];
    if (end >= 0) event.target.focus();
    const at = (now) => {
      if (end === 0) return [Math.min(this.bin(now, Math.round), start[1] - 1), start[1]];
      if (end === 1) return [start[0], Math.max(this.bin(now, Math.round), start[0] + 1)];
      const to = this.bin(now, Math.floor);
      if (!inside) return [Math.min(from, to), Math.max(from, to) + 1];
      const by = Math.max(-start[0], Math.min(this.n - start[1], to - from));
      return [start[0] + by, start[1] + by];
    };
    const move = (now) => this.send(at(now), true);
    const done = (now) => {
      this.plot.removeEventListener("pointermove", move);
      this.plot.removeEventListener("pointerup", done);
      this.plot.removeEventListener("pointercancel", done);
      this.send(at(now));
    };
    this.plot.addEventListener("pointermove", move);
    this.plot.addEventListener("pointerup", done);
    this.plot.addEventListener("pointercancel", done);
  }

  // What the bin under the mouse holds.
  tell(event) {
    const i = this.bin(event, Math.floor);
    const values = [...new Set(this.values([i, i + 1]))].join(" to ");
    const counts = this.model.get("counts")[this.score];
    const n = (name) => whole((name === "whole" ? this.bins.whole : counts[name])[i]);
    this.plot.title = `${values}: ${n("whole")}, of which ${n("passing")} pass the other ` +
      `filters and ${n("selected")} are selected`;
  }

  update() {
    const counts = this.model.get("counts")[this.score];
    if (!counts) return;
    for (const name of ["passing", "selected"])
      this.layers[name].setAttribute("d", bars(counts[name], this.most, LAYERS[name]));
  }

  brush() {
    const range = this.range();
    const values = this.values(range);
    const set = this.score in this.model.get("ranges");
    this.said.textContent = set ? `${values[0]} to ${values[1]}` : this.bins.note;
    this.clear.style.visibility = set ? "visible" : "hidden";
    this.node.classList.toggle("kdlib-set", set);
    [[0, range[0]], [range[1], this.n]].forEach(([from, to], i) => {
      this.shades[i].setAttribute("x", from);
      this.shades[i].setAttribute("width", to - from);
    });
    this.handles.forEach((node, end) => {
      node.style.left = `${(100 * range[end]) / this.n}%`;
      node.setAttribute("aria-valuemin", this.bins.edges[0]);
      node.setAttribute("aria-valuemax", this.bins.edges[this.n]);
      node.setAttribute("aria-valuenow", this.bins.edges[range[end]]);
      node.setAttribute("aria-valuetext", values[end]);
    });
  }
}

class Classes {
  constructor(parent, model) {
    this.model = model;
    const { names, whole: all } = model.get("classes");
    this.all = all;
    this.most = Math.max(1, ...all);
    const head = add(parent, "div", "kdlib-panel-head");
    add(head, "b").textContent = "class";
    this.said = add(head, "span", "kdlib-panel-range");
    this.clear = add(head, "button", "kdlib-small", {
      title: "Show all classes", "aria-label": "Show all classes",
    });
    this.clear.textContent = "all";
    this.clear.onclick = () => this.send([]);
    if (names.length > 20) {
      const search = add(parent, "input", "kdlib-search", {
        placeholder: `search ${whole(names.length)} classes`, "aria-label": "Search a class",
      });
      search.oninput = () => names.forEach((name, label) => {
        const found = name.toLowerCase().includes(search.value.toLowerCase());
        this.rows[label].style.display = found ? "" : "none";
      });
    }
    const list = add(parent, "div", "kdlib-classes", { role: "group", "aria-label": "classes" });
    this.rows = names.map((name, label) => {
      const row = add(list, "button", "kdlib-class", { "data-label": label });
      add(row, "span", "kdlib-class-name").textContent = name;
      row.bar = add(row, "span", "kdlib-class-bar");
      row.layers = Object.keys(LAYERS).map((layer) => add(row.bar, "span", `kdlib-${layer}`));
      row.n = add(row, "span", "kdlib-class-n");
      row.onclick = () => {
        const chosen = this.model.get("chosen");
        this.send(chosen.includes(label) ? chosen.filter((c) => c !== label) : [...chosen, label]);
      };
      return row;
    });
    this.update();
    this.choose();
  }

  send(chosen) {
    this.model.set("chosen", chosen);
    this.model.set("dragging", false);
    this.model.save_changes();
  }

  update() {
    const counts = { whole: this.all, ...this.model.get("class_counts") };
    this.rows.forEach((row, label) => {
      Object.keys(LAYERS).forEach((name, i) => {
        row.layers[i].style.width = `${(100 * counts[name][label]) / this.most}%`;
      });
      const [n, passing, all] = ["selected", "passing", "whole"].map((k) => counts[k][label]);
      row.n.textContent = `${whole(n)} of ${whole(all)}`;
      row.title = `${row.firstChild.textContent}: ${whole(n)} selected of ${whole(all)}; ` +
        `${whole(passing)} pass the other filters`;
    });
  }

  choose() {
    const chosen = this.model.get("chosen");
    this.clear.style.visibility = chosen.length ? "visible" : "hidden";
    this.said.textContent = chosen.length ? `${chosen.length} of ${this.rows.length}` : "selected";
    this.rows.forEach((row, label) => {
      row.setAttribute("aria-pressed", chosen.includes(label));
      row.classList.toggle("kdlib-out", chosen.length > 0 && !chosen.includes(label));
    });
  }
}

export default {
  render({ model, el }) {
    el.classList.add("kdlib-filter");
    const legend = add(el, "div", "kdlib-legend");
    for (const [layer, text] of [["whole", "all"], ["passing", "shown"], ["selected", "selected"]]) {
      add(legend, "i", `kdlib-${layer}`);
      add(legend, "span").textContent = text;
    }
    legend.title = "The height of a bar is the square root of its count";
    const list = add(el, "div");
    const adder = add(el, "select", "kdlib-add", { "aria-label": "Add a histogram" });
    adder.onchange = () => {
      model.set("shown", [...model.get("shown"), adder.value]);
      model.save_changes();
    };
    const classes = new Classes(add(el, "div"), model);
    let panels = [];
    function open() { // as soon as the bins of all open scores are there
      const scores = model.get("shown");
      if (!scores.every((score) => score in model.get("bins") && score in model.get("counts")))
        return;
      const kept = Object.fromEntries(panels.map((panel) => [panel.score, panel]));
      panels = scores.map((score) => kept[score] ?? new Panel(list, model, score));
      list.replaceChildren(...panels.map((panel) => panel.node));
      adder.replaceChildren();
      add(adder, "option", "", { value: "" }).textContent = "add a histogram …";
      for (const score of model.get("scores").filter((s) => !scores.includes(s)))
        add(adder, "option", "", { value: score }).textContent = score;
    }
    open();
    const on = {
      "change:shown": open,
      "change:bins": open,
      "change:counts": () => { open(); panels.forEach((panel) => panel.update()); },
      "change:ranges": () => panels.forEach((panel) => panel.brush()),
      "change:class_counts": () => classes.update(),
      "change:chosen": () => classes.choose(),
    };
    for (const [event, call] of Object.entries(on)) model.on(event, call);
    return () => {
      for (const [event, call] of Object.entries(on)) model.off(event, call);
    };
  },
};
