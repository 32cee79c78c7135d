// One map: regl-scatterplot draws the points, and this draws axes and lasso and finds what is
// pointed at, so that a large map is drawn again only when it changes.
function linear(domain, range) {
  const scale = (v) =>
    range[0] + ((v - domain[0]) / (domain[1] - domain[0])) * (range[1] - range[0]);
  scale.invert = (p) =>
    domain[0] + ((p - range[0]) / (range[1] - range[0])) * (domain[1] - domain[0]);
  scale.domain = (d) => (d ? ((domain = [...d]), scale) : domain);
  scale.range = (r) => (r ? ((range = [...r]), scale) : range);
  return scale;
}

function ticks([low, high], n) {
  const rough = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-9 * step; k++) {
    found.push(Number((k * step).toPrecision(6)));
  }
  return found;
}

class DataMap {
  // n points; `on` has lasso(indices, how), point(index or -1) and choose(index)
  constructor(parent, name, n, on) {
    this.n = n;
    this.on = on;
    this.hidden = null; // (n,) what is not drawn, null: all are drawn
    this.box = el("div", { class: "map" });
    if (name) this.box.append(el("div", { class: "name" }, name));
    parent.append(this.box);
    this.canvas = el("canvas");
    if (!webgl()) {
      this.box.append(
        el("p", { class: "none" }, "This browser cannot draw with WebGL, so that the map is not " +
          "shown; images, filters and results work without it.")
      );
      return;
    }
    this.glass = el("div", { class: "glass" });
    this.lines = el("svg", { "aria-hidden": "true" });
    this.box.append(this.canvas, this.glass, this.lines);
    this.xScale = linear([0, 1], [0, 1]);
    this.yScale = linear([0, 1], [1, 0]);
    const { width, height } = this.size();
    this.plot = createScatterplot.default({
      canvas: this.canvas, width, height, aspectRatio: width / height, mouseMode: "panZoom",
      xScale: this.xScale, yScale: this.yScale, spatialIndexUseWorker: false, syncEvents: true,
      pointSize: n < 5000 ? 7 : n < 100000 ? 4 : 2, pointSizeSelected: n < 100000 ? 2 : 1,
      pointOutlineWidth: 1, opacity: n < 100000 ? 0.8 : 0.6, performanceMode: n > 200000,
      deselectOnDblClick: false, deselectOnEscape: false, lassoOnLongPress: false,
    });
    this.plot.subscribe("select", ({ points }) => (this.found = Array.from(points)));
    this.plot.subscribe("view", () => this.axes());
    this.listen();
    new ResizeObserver(() => {
      const now = this.size();
      if (now.width <= 0) return;
      this.plot.set({ ...now, aspectRatio: now.width / now.height }).then(() => this.axes());
    }).observe(this.box);
    this.theme();
  }

  // Of the canvas, which leaves room for axes (style.css): the library gives it fixed sizes.
  size() {
    return { width: this.box.clientWidth - 64, height: this.box.clientHeight - 72 };
  }

  theme() {
    if (!this.plot) return;
    const style = getComputedStyle(document.documentElement);
    this.lit = style.getPropertyValue("--lit").trim();
    this.plot.set({ backgroundColor: style.getPropertyValue("--back").trim() });
  }

  // x, y: {name, values, low, high}; colour: {values, palette, continuous}
  async draw(x, y, colour) {
    if (!this.plot) return;
    this.ends = [x, y].map(({ low, high }) => {
      const wider = 0.02 * (high - low) || 1;
      return [low - wider, high + wider];
    });
    [this.x, this.y] = [x, y].map(({ values }, k) => {
      const [low, high] = this.ends[k];
      const places = new Float32Array(this.n);
      for (let i = 0; i < this.n; i++) {
        const v = (2 * (values[i] - low)) / (high - low) - 1;
        places[i] = Number.isNaN(v) ? 9 : v; // outside of the map
      }
      return places;
    });
    this.names = [x.name, y.name];
    const moved = this.drawn !== x.name + "\n" + y.name;
    const kept = moved ? undefined : this.plot.get("spatialIndex");
    if (moved) {
      this.xScale.domain(this.ends[0]);
      this.yScale.domain(this.ends[1]);
      await this.plot.set({ xScale: this.xScale, yScale: this.yScale });
      if (this.drawn) this.plot.reset();
    }
    this.drawn = x.name + "\n" + y.name;
    const lit = colour.palette.map(() => this.lit); // as many, else the library shows none
    await this.plot.set({
      pointColor: colour.palette, pointColorActive: lit, pointColorHover: lit, colorBy: "valueA",
    });
    await this.plot.draw(
      { x: this.x, y: this.y, z: colour.values },
      { zDataType: colour.continuous ? "continuous" : "categorical", spatialIndex: kept,
        preventFilterReset: true }
    );
    this.axes();
  }

  show(indices, hidden) {
    this.hidden = hidden;
    if (!this.plot) return;
    if (indices === null) this.plot.unfilter({ preventEvent: true });
    else this.plot.filter(indices, { preventEvent: true });
  }

  select(indices) {
    if (!this.plot) return;
    if (indices.length) this.plot.select(Array.from(indices), { preventEvent: true });
    else this.plot.deselect({ preventEvent: true });
  }

  whole() {
    if (this.plot) this.plot.reset();
  }

  moving(yes) {
    if (this.glass) this.glass.classList.toggle("moving", yes);
  }

  // Where a point lies in the box, in pixels.
  at(i) {
    const [left, top] = [this.canvas.offsetLeft, this.canvas.offsetTop];
    const value = (k, places) =>
      this.ends[k][0] + ((places[i] + 1) / 2) * (this.ends[k][1] - this.ends[k][0]);
    return [left + this.xScale(value(0, this.x)), top + this.yScale(value(1, this.y))];
  }

  // The drawn point nearest to a place of the canvas, within a few pixels; -1 for none.
  nearest(px, py) {
    if (!this.x) return -1;
    const line = (k, scale) => {
      const [low, high] = this.ends[k];
      const [a, b] = [scale(low), scale(high)];
      return [(b - a) / 2, (a + b) / 2];
    };
    const [[ax, bx], [ay, by]] = [line(0, this.xScale), line(1, this.yScale)];
    let [best, found] = [64, -1];
    for (let i = 0; i < this.n; i++) {
      const [dx, dy] = [ax * this.x[i] + bx - px, ay * this.y[i] + by - py];
      const distance = dx * dx + dy * dy;
      if (distance < best && !(this.hidden && this.hidden[i])) [best, found] = [distance, i];
    }
    return found;
  }

  mark(i) {
    if (!this.plot) return;
    this.marked = i;
    this.lines.querySelectorAll(".mark").forEach((node) => node.remove());
    if (i < 0 || !this.x) return;
    const [cx, cy] = this.at(i);
    this.lines.append(el("circle", { class: "mark", cx, cy, r: 7 }));
  }

  listen() {
    let [path, frame] = [null, 0];
    const place = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const line = el("path", { class: "lasso" });
    this.glass.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.glass.setPointerCapture(event.pointerId);
      this.how = event.altKey ? "remove" : event.shiftKey ? "add" : "replace";
      path = [place(event)];
      this.lines.append(line);
    });
    this.box.addEventListener("pointermove", (event) => {
      const here = place(event);
      if (path) {
        path.push(here);
        const [left, top] = [this.canvas.offsetLeft, this.canvas.offsetTop];
        line.setAttribute("d", "M" + path.map(([x, y]) => `${x + left} ${y + top}`).join("L") + "Z");
      } else if (!frame && event.buttons === 0) {
        frame = requestAnimationFrame(() => {
          frame = 0;
          this.on.point(this.nearest(...here));
        });
      }
    });
    const end = (event) => {
      if (!path) return;
      const drawn = path;
      path = null;
      line.remove();
      line.removeAttribute("d");
      const far = drawn.some(([x, y]) => Math.hypot(x - drawn[0][0], y - drawn[0][1]) > 4);
      if (event.type === "pointercancel") return;
      if (far) {
        // no event comes of a lasso around nothing, nor of one around what is selected already
        this.found = [];
        this.plot.deselect({ preventEvent: true });
        this.plot.lassoSelect(drawn.map(([x, y]) => [this.xScale.invert(x), this.yScale.invert(y)]));
        this.on.lasso(this.found, this.how);
      } else {
        const i = this.nearest(...drawn[0]);
        if (i >= 0) this.on.choose(i);
      }
    };
    this.glass.addEventListener("pointerup", end);
    this.glass.addEventListener("pointercancel", end);
    this.box.addEventListener("pointerleave", () => !path && this.on.point(-1));
    // The library looks for a point under every move, and draws the map again: it is told of moves
    // that drag, and of the place where the wheel turns.
    const silence = (event) => {
      const drags = event.buttons !== 0 && this.glass.classList.contains("moving");
      if (!drags && !event.told) event.stopPropagation();
    };
    this.box.addEventListener("mousemove", silence, true);
    this.box.addEventListener("wheel", (event) => {
      if (event.told) return;
      event.preventDefault();
      event.stopPropagation();
      for (const Kind of [MouseEvent, WheelEvent]) {
        const same = new Kind(Kind === MouseEvent ? "mousemove" : "wheel", event);
        same.told = true;
        this.canvas.dispatchEvent(same);
      }
    }, { capture: true, passive: false });
  }

  axes() {
    const { width, height } = this.size();
    const [left, top] = [this.canvas.offsetLeft, this.canvas.offsetTop];
    this.lines.querySelectorAll(".axis").forEach((node) => node.remove());
    const group = el("g", { class: "axis" });
    for (const v of ticks(this.xScale.domain(), width / 90)) {
      const x = left + this.xScale(v);
      group.append(
        el("line", { class: "rule", x1: x, x2: x, y1: top + height, y2: top + height + 4 }),
        el("text", { x, y: top + height + 16, "text-anchor": "middle" }, String(v))
      );
    }
    for (const v of ticks(this.yScale.domain(), height / 60)) {
      const y = top + this.yScale(v);
      group.append(
        el("line", { class: "rule", x1: left - 4, x2: left, y1: y, y2: y }),
        el("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, String(v))
      );
    }
    group.append(
      el("path", { class: "rule", fill: "none", d: `M${left} ${top}V${top + height}H${left + width}` }),
      el("text", { x: left + width / 2, y: top + height + 34, "text-anchor": "middle" },
        this.names ? this.names[0] : ""),
      el("text", { "text-anchor": "middle",
        transform: `translate(13 ${top + height / 2}) rotate(-90)` }, this.names ? this.names[1] : "")
    );
    this.lines.prepend(group);
    if (this.marked >= 0) this.mark(this.marked);
  }
}

function webgl() {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("webgl");
  const needed = ["OES_texture_float", "OES_element_index_uint"];
  if (!context || !needed.every((name) => context.getExtension(name))) return false;
  context.getExtension("WEBGL_lose_context")?.loseContext();
  return true;
}
